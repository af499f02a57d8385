//! Texts: every form of file, and where one is found when none is named.

use insta::assert_snapshot;

use crate::session::Session;

const LINE: &str = "-q eval W4A16 --preset disjoint --ctx 32 --json r.json";

#[test]
fn forms_of_text() {
    let session = Session::with(&["W4A16"]);
    let text = std::fs::read_to_string(session.path("text.txt")).expect("the text");
    let sentences: Vec<&str> = text.split_inclusive(". ").take(40).collect();
    let rows: Vec<String> =
        sentences.iter().map(|row| serde_json::json!({ "text": row }).to_string()).collect();
    session.write("rows.jsonl", rows.join("\n"));
    session.write("lines.raw", sentences.join("\n\n"));
    session.write("one.txt", sentences.concat());
    let mut shown = Vec::new();
    for name in ["one.txt", "lines.raw", "rows.jsonl"] {
        session.ctq(&format!("{LINE} --data {name}")).expect(0);
        let record = &session.json("r.json")[0];
        let text = &record["text"];
        shown.push(format!(
            "{} {} {} rows, {} tokens",
            text["file"], text["form"], text["rows"], record["tokens"]
        ));
    }
    assert_snapshot!(shown.join("\n"), @r#"
    "one.txt" "txt" 1 rows, 1211 tokens
    "lines.raw" "raw" 87 rows, 1484 tokens
    "rows.jsonl" "jsonl" 40 rows, 1355 tokens
    "#);
}

#[test]
fn texts_that_are_none() {
    let session = Session::with(&["W4A16"]);
    session.write("binary.txt", b"good \xff bad");
    session.write("empty.txt", " \n ");
    session.write("rows.jsonl", "{\"text\": \"a\"}\n{\"txt\": 1}\n");
    session.write("text.parquet", "PAR1");
    session.write("text.md", "text");
    let messages: Vec<String> =
        ["binary.txt", "empty.txt", "rows.jsonl", "text.parquet", "text.md", "gone.txt"]
            .iter()
            .map(|name| session.ctq(&format!("{LINE} --data {name}")).expect(2).stderr)
            .collect();
    assert_snapshot!(messages.concat(), @r#"
    error: binary.txt: not UTF-8 at byte 5; convert the file to UTF-8
    error: empty.txt: nothing but white space, rows: 1; give a file with text
    error: rows.jsonl: line 2: there is no field "text" that holds a string; each line must be an object like {"text": "..."}
    error: text.parquet: EOF: Parquet file too small. Size is 4 but need 8; a Parquet data set needs a string column "text", and .txt and .jsonl also work
    error: text.md: unknown form of text; name it .txt, .raw, .jsonl or .parquet
    error: gone.txt: cannot read: No such file or directory (os error 2); check the path and its permissions
    "#);
}

#[test]
fn no_text_is_named() {
    let session = Session::with(&["W4A16"]);
    assert_snapshot!(session.ctq(LINE).expect(2).stderr, @"error: no text to score: looked for WikiText-2 in $CTQ_DATA and in the Hugging Face cache DIR/home/.cache/huggingface/hub; fetch it with `hf download Salesforce/wikitext wikitext-2-raw-v1/test-00000-of-00001.parquet --repo-type dataset`, which puts it there, or give --data a .txt, .raw, .jsonl or .parquet file");
    let with = |variable: &str, value: &str| {
        let mut command = session.command(LINE);
        command.env(variable, value);
        session.run(command)
    };
    with("CTQ_DATA", "text.txt").expect(0);
    assert_snapshot!(with("CTQ_DATA", "gone.txt").expect(2).stderr, @"error: gone.txt: $CTQ_DATA names this, and it is no file; set it to a .txt, .raw, .jsonl or .parquet file");
}

#[test]
fn a_text_shorter_than_one_window() {
    let session = Session::with(&["W4A16"]);
    session.write("short.txt", "one two three");
    let ran = session.ctq("-q eval W4A16 --data short.txt --json r.json").expect(2);
    assert_snapshot!(ran.stderr, @"error: W4A16: short.txt: protocol exl3-2025-small: text shorter than one window: it has 9 tokens, and windows of 2048 need at least 2049; give a longer text or a smaller ctx");
    assert_eq!(session.json("r.json")[0]["status"], "failed");
}

//! Data sets: every form, WikiText-2 from both of its files, and where it is looked for.

use std::ffi::OsString;
use std::path::Path;

use ctq_eval::Error;
use ctq_eval::protocol::JoinRule;
use ctq_eval::text::{Environment, KnownText, Text, TextForm, discover};

use crate::assets;

const RAW_SHA256: &str = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08";

fn load(name: &str, content: &[u8]) -> Result<Text, Error> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join(name);
    std::fs::write(&path, content).expect("a small file");
    Text::load(&path)
}

#[test]
fn wikitext_is_the_same_from_both_of_its_files() {
    let (Some(raw), Some(parquet)) = (assets::wikitext_raw(), assets::wikitext_parquet()) else { return };
    let raw = Text::load(&raw).expect("the raw file");
    let parquet = Text::load(&parquet).expect("the parquet file");
    assert_eq!(raw.rows, parquet.rows);
    assert_eq!(raw.whole, parquet.whole);
    for text in [&raw, &parquet] {
        assert_eq!(text.source.recognised, Some(KnownText::WikiText2Test));
        assert_eq!((text.source.rows, text.source.rows_with_text), (4358, 2891));
        assert_eq!(text.source.whole_sha256, RAW_SHA256);
    }
    assert_eq!(raw.source.file_sha256, RAW_SHA256);
    assert_eq!(
        parquet.source.file_sha256,
        "d7237f61af9232195deb51a81516cb52c615edda84399cb244677555a59ddf0d"
    );
}

#[test]
fn wikitext_is_recognised_under_another_name_and_in_another_form() {
    let Some(raw) = assets::wikitext_raw() else { return };
    let bytes = std::fs::read(raw).expect("the raw file");
    let renamed = load("notes.txt", &bytes).expect("a renamed raw file");
    assert_eq!(renamed.source.form, TextForm::Raw);
    let lines: String =
        renamed.rows.iter().map(|row| serde_json::json!({ "text": row }).to_string() + "\n").collect();
    let jsonl = load("wiki.jsonl", lines.as_bytes()).expect("the rows as JSON lines");
    assert_eq!(jsonl.source.recognised, Some(KnownText::WikiText2Test));
    assert_eq!(jsonl.source.whole_sha256, RAW_SHA256);
}

#[test]
fn plain_text_is_one_row() {
    let text = load("a.txt", b"one\n\ntwo\n").expect("a text");
    assert_eq!(
        (text.rows.as_slice(), text.whole.as_str()),
        (&["one\n\ntwo\n".to_owned()][..], "one\n\ntwo\n")
    );
    assert_eq!(text.source.recognised, None);
}

#[test]
fn a_foreign_raw_file_follows_the_same_line_rule_and_keeps_its_bytes() {
    let text = load("a.raw", b" = T = \n\t \nend").expect("a text");
    assert_eq!(text.rows, [" = T = \n", "", "end"]);
    assert_eq!(text.whole, " = T = \n\t \nend");
}

#[test]
fn joins_follow_the_protocols() {
    let text = load("a.jsonl", b"{\"text\":\"a\"}\n\n{\"text\":\"\",\"id\":3}\r\n{\"text\":\" b\\n\"}")
        .expect("a text");
    assert_eq!(text.rows, ["a", "", " b\n"]);
    assert_eq!(text.joined(JoinRule::AllRows), "a\n\n\n\n b\n");
    assert_eq!(text.joined(JoinRule::RowsWithText), "a\n\n b\n");
    assert_eq!(text.joined(JoinRule::WholeFile), "a\n\n b\n");
}

#[test]
fn parquet_rows_come_from_the_column_text() {
    let text = Text::load(&assets::small("snappy.parquet")).expect("a parquet file");
    assert_eq!(text.rows, ["one\n", "", "three é\n"]);
    assert_eq!(text.source.form, TextForm::Parquet);
}

#[test]
fn refusals_say_what_to_do() {
    let message = |result: Result<Text, Error>| result.expect_err("a refusal").to_string();
    let zstd = message(Text::load(&assets::small("zstd.parquet")));
    assert!(zstd.contains("ZSTD") && zstd.contains(".jsonl"), "{zstd}");
    let column = message(Text::load(&assets::small("no-text-column.parquet")));
    assert!(column.contains("no column \"text\" (its columns: body)"), "{column}");
    let line = message(load("a.jsonl", b"{\"text\":\"a\"}\n{\"body\":\"b\"}\n"));
    assert!(line.contains("line 2") && line.contains("no field \"text\""), "{line}");
    assert!(message(load("a.csv", b"a")).contains(".parquet"));
    assert!(message(load("a.txt", b"ab\xff")).contains("byte 2"));
    assert!(message(load("a.parquet", b"not parquet")).contains("a.parquet"));
    assert!(matches!(load("a.raw", b" \n \n"), Err(Error::EmptyText { rows: 2, .. })));
    assert!(matches!(Text::load(Path::new("/nowhere/a.txt")), Err(Error::Read { .. })));
}

/// An environment with these variables only.
fn variables(pairs: &[(&'static str, &Path)]) -> Environment<'static> {
    let pairs: Vec<(&str, OsString)> = pairs.iter().map(|(name, path)| (*name, path.into())).collect();
    Environment::new(move |name| {
        pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone())
    })
}

fn touch(path: &Path) {
    std::fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
    std::fs::write(path, b"x").expect("a file");
}

#[test]
fn the_variable_comes_first() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("my.txt");
    touch(&file);
    assert_eq!(discover(&variables(&[("CTQ_DATA", &file)])).expect("found"), file);
    let missing = discover(&variables(&[("CTQ_DATA", &directory.path().join("gone.txt"))]));
    assert!(matches!(missing, Err(Error::DataVariable { .. })));
}

#[test]
fn the_cache_is_searched_where_the_hub_keeps_it() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let hub = home.path().join(".cache/huggingface/hub");
    let snapshots = hub.join("datasets--Salesforce--wikitext/snapshots");
    let old = snapshots.join("aaa/wikitext-2-raw-v1/test-00000-of-00001.parquet");
    let main = snapshots.join("bbb/wikitext-2-raw-v1/test/0000.parquet");
    touch(&old);
    touch(&snapshots.join("bbb/wikitext-2-raw-v1/train-00000-of-00001.parquet"));
    let found = |pairs: &[(&'static str, &Path)]| discover(&variables(pairs)).expect("found");
    assert_eq!(found(&[("HOME", home.path())]), old);
    touch(&main);
    std::fs::create_dir_all(hub.join("datasets--Salesforce--wikitext/refs")).expect("directories");
    std::fs::write(hub.join("datasets--Salesforce--wikitext/refs/main"), "bbb").expect("a file");
    assert_eq!(found(&[("HOME", home.path())]), main);
    assert_eq!(found(&[("HF_HUB_CACHE", &hub), ("HOME", Path::new("/nowhere"))]), main);
    assert_eq!(found(&[("HF_HOME", &home.path().join(".cache/huggingface"))]), main);
}

#[test]
fn nothing_found_says_what_to_fetch() {
    let empty = tempfile::tempdir().expect("a temporary directory");
    let message = discover(&variables(&[("HF_HOME", empty.path())])).expect_err("nothing").to_string();
    assert!(message.contains("hf download Salesforce/wikitext") && message.contains("--data"), "{message}");
    assert!(message.contains(&empty.path().join("hub").display().to_string()), "{message}");
    assert!(discover(&variables(&[])).is_err());
}

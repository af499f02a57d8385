//! BOS rules, special tokens and limits, on a tokenizer small enough to check by eye.

use std::path::Path;

use ctq_eval::Error;
use ctq_eval::protocol::{BosRule, Overrides, Protocol};
use ctq_eval::text::Text;
use ctq_eval::tokens::{TokenStream, Tokenizer, WindowHead};
use serde_json::{Value, json};

const BOS: u32 = 4;

/// Words split at white space: a = 1, b = 2, c = 3, `<s>` = 4 (special), anything else 0. It truncates and
/// pads, and may put `<s>` first.
fn tokenizer_json(post_processor: Value) -> Value {
    let special = json!({"id": BOS, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    json!({
        "version": "1.0", "normalizer": null, "decoder": null,
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "?"},
        "added_tokens": [special],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": post_processor,
        "model": {"type": "WordLevel", "vocab": {"?": 0, "a": 1, "b": 2, "c": 3, "<s>": BOS}, "unk_token": "?"}
    })
}

fn bos_first() -> Value {
    json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}})
}

fn tokenizer(post_processor: Value, config: &Value) -> Tokenizer {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let write = |name: &str, value: &Value| {
        std::fs::write(directory.path().join(name), value.to_string()).expect("a small file");
    };
    write("tokenizer.json", &tokenizer_json(post_processor));
    write("tokenizer_config.json", config);
    Tokenizer::load(directory.path()).expect("a tokenizer")
}

fn text(content: &str) -> Text {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("a.txt");
    std::fs::write(&path, content).expect("a small file");
    Text::load(&path).expect("a text")
}

fn stream(tokenizer: &mut Tokenizer, preset: &str, bos: BosRule) -> Result<TokenStream, Error> {
    let protocol = Protocol::resolve(preset, &Overrides { bos: Some(bos), ..Overrides::default() });
    tokenizer.stream(&text("a b c a"), &protocol.expect("a protocol"), 5)
}

#[test]
fn each_bos_rule_puts_it_where_it_says() {
    let named = json!({"bos_token": "<s>"});
    let cases = [
        (BosRule::TokenizerDefault, vec![4, 1, 2, 3, 1], WindowHead::Stream),
        (BosRule::None, vec![1, 2, 3, 1], WindowHead::Stream),
        (BosRule::Once, vec![4, 1, 2, 3, 1], WindowHead::Stream),
        (BosRule::EveryWindow, vec![4, 1, 2, 3, 1], WindowHead::Bos(4)),
        (BosRule::ReplaceFirst, vec![1, 2, 3, 1], WindowHead::Bos(4)),
        (BosRule::LlamaCpp, vec![4, 1, 2, 3, 1], WindowHead::Bos(4)),
    ];
    for (rule, ids, head) in cases {
        let stream = stream(&mut tokenizer(bos_first(), &named), "exl3-ppl", rule).expect("a stream");
        assert_eq!((stream.ids(), stream.head()), (&ids[..], head), "{rule}");
        assert!(stream.notes().is_empty());
    }
}

#[test]
fn a_tokenizer_without_bos_gets_none_unless_forced() {
    for config in
        [json!({"bos_token": "<s>"}), json!({"bos_token": {"content": "<s>"}, "add_bos_token": false})]
    {
        for rule in [BosRule::TokenizerDefault, BosRule::LlamaCpp] {
            let stream = stream(&mut tokenizer(Value::Null, &config), "exl3-ppl", rule).expect("a stream");
            assert_eq!((stream.ids(), stream.head()), (&[1, 2, 3, 1][..], WindowHead::Stream), "{rule}");
        }
        let once = stream(&mut tokenizer(Value::Null, &config), "exl3-ppl", BosRule::Once).expect("a stream");
        assert_eq!(once.ids(), [4, 1, 2, 3, 1]);
    }
}

#[test]
fn add_bos_token_decides_where_the_files_disagree_and_that_is_said() {
    let says = |value: bool| json!({"bos_token": "<s>", "add_bos_token": value});
    let rule = BosRule::TokenizerDefault;
    let added = stream(&mut tokenizer(Value::Null, &says(true)), "exl3-ppl", rule).expect("a stream");
    assert_eq!((added.ids(), added.notes().len()), (&[4, 1, 2, 3, 1][..], 1));
    let dropped = stream(&mut tokenizer(bos_first(), &says(false)), "exl3-ppl", rule).expect("a stream");
    assert_eq!((dropped.ids(), dropped.notes().len()), (&[1, 2, 3, 1][..], 1));
}

#[test]
fn classes_that_do_not_read_add_bos_token_go_by_the_post_processor() {
    let config =
        json!({"bos_token": "<s>", "add_bos_token": false, "tokenizer_class": "PreTrainedTokenizerFast"});
    let mut tokenizer = tokenizer(bos_first(), &config);
    let kept = stream(&mut tokenizer, "exl3-ppl", BosRule::TokenizerDefault).expect("a stream");
    assert_eq!((kept.ids(), kept.notes().len()), (&[4, 1, 2, 3, 1][..], 0));
    let dropped = stream(&mut tokenizer, "exl3-ppl", BosRule::LlamaCpp).expect("a stream");
    assert_eq!((dropped.ids(), dropped.head()), (&[1, 2, 3, 1][..], WindowHead::Stream));
}

#[test]
fn bos_may_come_from_the_model_and_may_be_missing() {
    let mut nameless = tokenizer(Value::Null, &json!({"bos_token": null}));
    assert!(matches!(stream(&mut nameless, "exl3-ppl", BosRule::Once), Err(Error::NoBos { .. })));
    let replaced = stream(&mut nameless, "exl3-ppl", BosRule::ReplaceFirst).expect("a stream");
    assert_eq!((replaced.head(), replaced.notes().len()), (WindowHead::Stream, 1));
    let mut helped = nameless.with_model_bos(Some(4));
    assert_eq!(stream(&mut helped, "exl3-ppl", BosRule::Once).expect("a stream").ids(), [4, 1, 2, 3, 1]);
}

#[test]
fn special_tokens_in_the_text_are_parsed_or_not() {
    let mut tokenizer = tokenizer(Value::Null, &json!({}));
    let mut ids = |preset: &str| {
        let protocol = Protocol::resolve(preset, &Overrides::default()).expect("a protocol");
        tokenizer.stream(&text("a x<s>b"), &protocol, 5).expect("a stream").ids().to_vec()
    };
    assert_eq!(ids("hf-strided"), [1, 0, 4, 2]);
    assert_eq!(ids("llamacpp"), [1, 0]);
    assert_eq!(ids("hf-strided"), [1, 0, 4, 2]);
}

#[test]
fn the_stream_is_cut_and_checked_against_the_embedding() {
    let mut tokenizer = tokenizer(bos_first(), &json!({"bos_token": "<s>"}));
    let overrides = Overrides { max_tokens: Some(3), ..Overrides::default() };
    let protocol = Protocol::resolve("disjoint", &overrides).expect("a protocol");
    assert_eq!(tokenizer.stream(&text("a b c a"), &protocol, 5).expect("a stream").ids(), [4, 1, 2]);
    let small = tokenizer.stream(&text("a b c a"), &protocol, 4);
    assert!(matches!(small, Err(Error::VocabularyTooLarge { largest: 4, embedding_rows: 4 })));
}

#[test]
fn entries_count_the_ids_of_every_file() {
    assert_eq!(tokenizer(Value::Null, &json!({})).entries(), 5);
    let config = json!({"added_tokens_decoder": {"9": {"content": "<x>", "special": true}}});
    assert_eq!(tokenizer(Value::Null, &config).entries(), 10);
}

#[test]
fn a_missing_tokenizer_says_where_to_get_one() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let message = Tokenizer::load(directory.path()).err().expect("an error").to_string();
    assert!(message.contains("copy tokenizer.json"), "{message}");
    std::fs::write(directory.path().join("tokenizer.json"), b"{").expect("a small file");
    assert!(matches!(Tokenizer::load(directory.path()), Err(Error::BadTokenizer { .. })));
    assert!(Tokenizer::load(Path::new("/nowhere")).is_err());
}

//! Windows against worked examples and counts of other people, and their invariants.

use std::ops::Range;

use ctq_eval::Error;
use ctq_eval::protocol::{
    BosRule, Coverage, DEFAULT_PRESET, Overrides, PRESETS, Protocol, describe_presets, protocol_id,
};
use ctq_eval::tokens::{TokenStream, WindowHead};
use ctq_model::window::Window;
use proptest::prelude::*;

const BOS: u32 = 7;

/// A stream of ids 100, 101, ...
fn stream(tokens: usize, head: WindowHead) -> TokenStream {
    TokenStream::new((100..100 + tokens as u32).collect(), head, 100 + tokens)
}

fn overrides(ctx: usize, stride: Option<usize>) -> Overrides {
    Overrides { ctx: Some(ctx), stride, ..Overrides::default() }
}

fn resolve(preset: &str, overrides: Overrides) -> Protocol {
    Protocol::resolve(preset, &overrides).expect("a protocol")
}

/// Start, and scored stream indices, of each window.
fn places(windows: &[Window]) -> Vec<(usize, Range<usize>)> {
    let scored = |window: &Window| window.start + window.scored.start..window.start + window.scored.end;
    windows.iter().map(|window| (window.start, scored(window))).collect()
}

/// The table of ten tokens, ctx 4, worked by hand and checked by a script of the peers' rules.
#[test]
fn ten_tokens_by_every_rule() {
    let cases = [
        ("exl3-2025-small", Some(2), vec![(0, 1..4), (2, 3..6), (4, 5..8)]),
        ("exl3-2025-small", Some(4), vec![(0, 1..4), (4, 5..8)]),
        ("exl3-ppl", None, vec![(0, 1..4), (4, 5..8)]),
        ("hf-strided", Some(2), vec![(0, 1..4), (2, 4..6), (4, 6..8), (6, 8..10)]),
        ("disjoint", None, vec![(0, 1..4), (4, 5..8)]),
        ("llamacpp", None, vec![(0, 3..4), (4, 7..8)]),
    ];
    for (preset, stride, expected) in cases {
        let windows = resolve(preset, overrides(4, stride)).windows(&stream(10, WindowHead::Stream));
        assert_eq!(places(&windows.expect("windows")), expected, "{preset} {stride:?}");
    }
}

#[test]
fn bos_takes_the_first_seat_of_each_chunk() {
    let protocol = resolve("llamacpp", overrides(4, None));
    let windows = protocol.windows(&stream(10, WindowHead::Bos(BOS))).expect("windows");
    let fed: Vec<&[u32]> = windows.iter().map(|window| window.ids.as_slice()).collect();
    assert_eq!(fed, [[BOS, 101, 102, 103], [BOS, 105, 106, 107]]);
}

#[test]
fn exl3_drops_the_window_that_ends_with_the_text_and_disjoint_keeps_it() {
    let count = |preset: &str, tokens| {
        let protocol = resolve(preset, overrides(4, Some(4)));
        protocol.windows(&stream(tokens, WindowHead::Stream)).map(|windows| windows.len())
    };
    assert_eq!([count("exl3-2025-small", 8).expect("one"), count("disjoint", 8).expect("two")], [1, 2]);
    assert_eq!(count("exl3-2025-small", 9).expect("two"), 2);
    assert!(matches!(count("exl3-2025-small", 4), Err(Error::TextTooShort { tokens: 4, needed: 5, .. })));
    assert_eq!(count("disjoint", 4).expect("one"), 1);
}

#[test]
fn llamacpp_needs_two_chunks() {
    let protocol = resolve("llamacpp", Overrides::default());
    let error = protocol.windows(&stream(1023, WindowHead::Stream)).expect_err("too short").to_string();
    assert!(error.contains("1023 tokens") && error.contains("at least 1024"), "{error}");
    let windows = protocol.windows(&stream(1024 + 511, WindowHead::Stream)).expect("windows");
    assert_eq!(windows.iter().map(|window| window.scored.len()).collect::<Vec<_>>(), [255, 255]);
}

/// Published counts for ctx 2048, stride 512: 149,431 by ExLlamaV3's rule, 39,216 by transformers'.
#[test]
fn counts_that_were_published() {
    let count = |preset: &str, tokens| {
        let overrides = Overrides { rows: Some(usize::MAX), ..overrides(2048, Some(512)) };
        let windows =
            resolve(preset, overrides).windows(&stream(tokens, WindowHead::Stream)).expect("windows");
        (windows.len(), windows.iter().map(|window| window.scored.len()).sum::<usize>())
    };
    assert_eq!(count("exl3-2025-small", 38_912).0, 72);
    assert_eq!(count("exl3-2025-small", 38_913), (73, 149_431));
    assert_eq!(count("exl3-2025-small", 39_424), (73, 149_431));
    assert_eq!(count("exl3-2025-small", 39_425).0, 74);
    assert_eq!(count("hf-strided", 39_217), (74, 39_216));
}

#[test]
fn the_protocol_id_is_the_hash_of_its_documented_bytes() {
    let exl3 = resolve("exl3-2025-small", overrides(4, Some(2)));
    let windows = exl3.windows(&stream(10, WindowHead::Stream)).expect("windows");
    assert_eq!(protocol_id(&windows, 128), "1958124996563c38");
    let llamacpp = resolve("llamacpp", overrides(4, None));
    let chunks = llamacpp.windows(&stream(10, WindowHead::Bos(BOS))).expect("windows");
    assert_eq!(protocol_id(&chunks, 128), "901a3f49559a3009");
    assert_ne!(protocol_id(&windows, 128), protocol_id(&windows, 127));
}

#[test]
fn one_question_has_one_id_whatever_it_is_called() {
    let stream = stream(40, WindowHead::Stream);
    let id = |preset: &str, overrides: Overrides| {
        protocol_id(&resolve(preset, overrides).windows(&stream).expect("windows"), 128)
    };
    let four_rows = Overrides { rows: Some(4), ..overrides(8, Some(8)) };
    assert_eq!(id("exl3-2025-small", four_rows), id("disjoint", four_rows));
    assert_ne!(
        id("exl3-2025-small", four_rows),
        id("hf-strided", Overrides { stride: Some(7), ..four_rows })
    );
}

#[test]
fn the_vocabulary_slice_is_the_protocols() {
    assert_eq!(resolve("exl3-2025-small", Overrides::default()).vocabulary(4160, 4096), 4160);
    assert_eq!(resolve("exl3-ppl", Overrides::default()).vocabulary(4160, 4096), 4096);
    assert_eq!(resolve("exl3-qbench", Overrides::default()).vocabulary(4000, 4096), 4000);
}

#[test]
fn coverage_counts_distinct_tokens() {
    let protocol = resolve("exl3-2025-small", overrides(4, Some(2)));
    let windows = protocol.windows(&stream(10, WindowHead::Stream)).expect("windows");
    let expected = Coverage { first: 1, last: 7, of: 10, percent: 70.0 };
    assert_eq!(Coverage::of(&windows, 10), Some(expected));
    assert_eq!(Coverage::of(&[], 10), None);
}

#[test]
fn presets_resolve_and_changes_show() {
    for preset in PRESETS {
        let protocol = resolve(preset.name, Overrides::default());
        assert_eq!(protocol.label(), preset.name);
        assert!(!preset.teaches.is_empty() && !preset.teaches.contains("  "), "{}", preset.name);
    }
    assert_eq!(PRESETS[0].name, DEFAULT_PRESET);
    assert!(describe_presets().starts_with("exl3-2025-small     2048/512x20     ExLlamaV3's charts of 2025"));
    assert_eq!(describe_presets().lines().count(), PRESETS.len());
    let changed =
        Overrides { rows: Some(10), bos: Some(BosRule::None), max_tokens: Some(99), ..overrides(64, None) };
    assert_eq!(resolve("exl3-ppl", changed).label(), "exl3-ppl (ctx 64, rows 10, max-tokens 99)");
    assert_eq!(resolve("disjoint", changed).label(), "disjoint (ctx 64, rows 10, max-tokens 99, bos none)");
}

#[test]
fn senseless_numbers_are_refused() {
    let refused = |preset: &str, overrides: Overrides| {
        assert!(
            matches!(Protocol::resolve(preset, &overrides), Err(Error::BadProtocol { .. })),
            "{overrides:?}"
        );
    };
    let same = Overrides::default();
    refused(DEFAULT_PRESET, Overrides { ctx: Some(1), ..same });
    refused(DEFAULT_PRESET, Overrides { stride: Some(0), ..same });
    refused(DEFAULT_PRESET, Overrides { rows: Some(0), ..same });
    refused(DEFAULT_PRESET, Overrides { max_tokens: Some(1), ..same });
    refused("llamacpp", Overrides { ctx: Some(2), ..same });
    refused("llamacpp", Overrides { stride: Some(256), ..same });
    refused("hf-strided", Overrides { stride: Some(4096), ..same });
    let unknown = Protocol::resolve("exl4", &same).expect_err("unknown").to_string();
    assert!(unknown.contains("exl3-2025-small, ") && unknown.contains("llamacpp"), "{unknown}");
    assert_eq!("once".parse::<BosRule>().expect("a rule"), BosRule::Once);
    assert!("twice".parse::<BosRule>().is_err());
}

/// Any preset, with any window length, stride, text length and number of rows that it admits.
fn any_windows() -> impl Strategy<Value = (&'static str, usize, Vec<Window>)> {
    let preset = prop::sample::select(PRESETS.iter().map(|preset| preset.name).collect::<Vec<_>>());
    (preset, 3..40_usize, 1..60_usize, 1..400_usize, prop::option::of(1..9_usize)).prop_filter_map(
        "this protocol scores such a text",
        |(preset, ctx, stride, tokens, rows)| {
            let stride = Overrides { stride: Some(stride), rows, ..overrides(ctx, None) };
            let plain = Overrides { stride: None, ..stride };
            let protocol = Protocol::resolve(preset, &stride).or_else(|_| Protocol::resolve(preset, &plain));
            let windows = protocol.ok()?.windows(&stream(tokens, WindowHead::Stream)).ok()?;
            Some((preset, tokens, windows))
        },
    )
}

proptest! {
    #[test]
    fn windows_keep_their_promises((preset, tokens, windows) in any_windows()) {
        prop_assert!(!windows.is_empty());
        for (index, window) in windows.iter().enumerate() {
            prop_assert_eq!(window.index, index);
            prop_assert!(window.start + window.ids.len() <= tokens);
            prop_assert!(window.scored.start >= 1, "{}: the first position has nothing before it", preset);
            prop_assert!(window.scored.start < window.scored.end && window.scored.end <= window.ids.len());
            prop_assert_eq!(window.ids[0] as usize, 100 + window.start);
        }
        prop_assert!(windows.windows(2).all(|pair| pair[0].start < pair[1].start));
    }

    #[test]
    fn hf_strided_scores_each_token_but_the_first_once(
        ctx in 2..50_usize, stride in 1..50_usize, tokens in 2..500_usize,
    ) {
        prop_assume!(stride < ctx);
        let protocol = resolve("hf-strided", overrides(ctx, Some(stride)));
        let windows = protocol.windows(&stream(tokens, WindowHead::Stream)).expect("windows");
        let scored: Vec<usize> = places(&windows).into_iter().flat_map(|(_, scored)| scored).collect();
        prop_assert_eq!(scored, (1..tokens).collect::<Vec<_>>());
        for window in &windows[1..] {
            prop_assert!(window.scored.start >= ctx - stride, "context of at least ctx - stride");
        }
    }
}

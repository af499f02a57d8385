//! `ctq bench`: that everything is there, in a form that scripts rely on. How fast is no matter.

use insta::assert_snapshot;
use serde_json::Value;

use crate::session::Session;
#[cfg(unix)]
use crate::session::{signal, wait_until};

const OF_MODEL: [(&str, &str); 6] = [
    ("all-gather", "heads"),
    ("all-gather", "hidden"),
    ("all-gather", "inner"),
    ("exchange", "log-sum-exps"),
    ("embed", "embeddings"),
    ("hand over", "hidden"),
];

/// Name, then bytes of one token to each of 2 ranks, and of 3: of heads' outputs, hidden states, inner columns, partial
/// log-sum-exps (all tiles of the other ranks, for the one row), an embedding, hidden states.
const MODELS: [(&str, [u64; 6], [u64; 6]); 3] = [
    (
        "Llama 8B",
        [8192, 8192, 28_672, 12 * 501, 16_384, 16_384],
        [4 * 128 * 22, 4 * 16 * 171, 4 * 16 * 598, 12 * 668, 16_384, 16_384],
    ),
    (
        "Llama 70B",
        [16_384, 16_384, 57_344, 12 * 501, 32_768, 32_768],
        [4 * 128 * 43, 4 * 16 * 342, 4 * 16 * 1195, 12 * 668, 32_768, 32_768],
    ),
    (
        "Mistral 123B",
        [24_576, 24_576, 57_344, 12 * 128, 49_152, 49_152],
        [4 * 128 * 64, 4 * 16 * 512, 4 * 16 * 1195, 12 * 170, 49_152, 49_152],
    ),
];

/// Fields of an object, in order.
fn keys(object: &Value) -> String {
    object.as_object().expect("an object").keys().cloned().collect::<Vec<_>>().join(" ")
}

#[test]
fn collectives_of_two_and_three_ranks() {
    let session = Session::new();
    for ranks in [2, 3] {
        let line =
            format!("-q bench --collective --tp {ranks} --rows 1 --rounds 1 --threads 2 --json b.json");
        let printed = session.ctq(&line).expect(0).stdout;
        assert!(printed.contains(&format!("\n{ranks} ranks on 1 device(s), ")), "{printed}");
        let written = session.json("b.json");
        let list = written["collectives"].as_array().expect("a list");
        let mut expected = vec![("exchange", "a byte", Value::Null, 0, ranks - 1)];
        for (model, of_two, of_three) in MODELS {
            for ((operation, what), bytes) in
                OF_MODEL.into_iter().zip(if ranks == 2 { of_two } else { of_three })
            {
                expected.push((operation, what, model.into(), 1, bytes));
            }
        }
        assert_eq!(list.len(), expected.len());
        for (timing, (operation, what, model, tokens, bytes)) in list.iter().zip(expected) {
            let told =
                ["operation", "what", "model", "tokens", "ranks", "bytes"].map(|key| timing[key].clone());
            let expected = [operation.into(), what.into(), model, tokens.into(), ranks.into(), bytes.into()];
            assert_eq!(told, expected);
            let seconds = ["fastest_seconds", "seconds", "slowest_seconds"].map(|key| timing[key].as_f64());
            assert!(seconds.iter().all(|seconds| seconds.is_some_and(|seconds| seconds > 0.0)), "{timing}");
            let floor = timing["floor_seconds"].as_f64();
            assert_eq!(floor.is_some_and(|seconds| seconds > 0.0), what != "a byte", "{timing}");
        }
    }
}

#[test]
fn a_measurement_has_the_fields_that_scripts_rely_on() {
    let session = Session::new();
    session.ctq("-q bench --collective --rows 1 --rounds 1 --json b.json").expect(0);
    let written = session.json("b.json");
    assert_eq!(written["bench_version"], 2);
    assert_snapshot!([keys(&written), keys(&written["team"]), keys(&written["collectives"][0])].join("\n"), @r"
    bench_version backend isa threads peaks timings windows convert team collectives
    ranks devices threads floor
    operation what model tokens ranks bytes seconds fastest_seconds slowest_seconds floor_seconds
    ");
    assert_eq!(written["peaks"], Value::Array(Vec::new()));
    assert_eq!((&written["team"]["ranks"], &written["team"]["devices"]), (&2.into(), &1.into()));
}

#[test]
fn one_rank_has_nobody_to_hand_things_to() {
    let session = Session::new();
    let refused = session.ctq("bench --collective --tp 1").expect(2).stderr;
    assert!(refused.contains("expected a whole number from 2 to 64"), "{refused}");
    let refused = session.ctq("bench --tp 2").expect(2).stderr;
    assert!(refused.contains("--collective"), "{refused}");
}

/// As little of a model as there is.
const TINY: &str = "--shape tiny --rounds 1 --json b.json";

fn list<'a>(written: &'a Value, key: &str) -> &'a [Value] {
    written[key].as_array().unwrap_or_else(|| panic!("`{key}` is no list"))
}

#[test]
fn every_operation_is_measured_beside_the_peak_of_its_instruction() {
    let session = Session::new();
    let line = format!("-q bench {TINY} --rows 16 --scheme w4a16,w8a8 --compute bf16 --threads 2");
    let printed = session.ctq(&line).expect(0).stdout;
    let written = session.json("b.json");
    assert_eq!((&written["bench_version"], &written["threads"]), (&2.into(), &2.into()));
    let text = |timing: &Value, key: &str| timing[key].as_str().unwrap_or_default().to_owned();
    let told = |timing: &Value| {
        ["operation", "what", "part", "acts", "compute"].map(|key| text(timing, key)).join("|")
    };
    let timings = list(&written, "timings");
    assert_snapshot!(timings.iter().map(told).collect::<Vec<_>>().join("\n"), @r"
    linear|int4 g128|q+k+v|off|bf16
    linear|int4 g128|o|off|bf16
    linear|int4 g128|gate+up|off|bf16
    linear|int4 g128|down|off|bf16
    linear|int8 channel|q+k+v|off|bf16
    linear|int8 channel|o|off|bf16
    linear|int8 channel|gate+up|off|bf16
    linear|int8 channel|down|off|bf16
    linear|int8 channel|q+k+v|kernel|bf16
    linear|int8 channel|o|kernel|bf16
    linear|int8 channel|gate+up|kernel|bf16
    linear|int8 channel|down|kernel|bf16
    head|bf16||off|bf16
    attention|4/2 heads of 32, 1 x 16||off|bf16
    decode|int4 g128|down|off|f32
    decode|int8 channel|down|off|f32
    norm|f32||off|f32
    gate|f32||off|f32
    add|f32||off|f32
    rotate|4 heads of 32||off|f32
    prepare|bf16||off|bf16
    prepare|int8 token dynamic||library|bf16
    prepare|int8 token dynamic||kernel|bf16
    ");
    assert_snapshot!([keys(&timings[0]), keys(&written["peaks"][0])].join("\n"), @r"
    operation what part acts m n k compute seconds fastest_seconds slowest_seconds operations bytes arithmetic instruction share_of_peak
    instruction operations_per_second fastest slowest
    ");
    for timing in timings {
        let seconds = ["fastest_seconds", "seconds", "slowest_seconds"].map(|key| timing[key].as_f64());
        assert!(seconds.iter().all(|seconds| seconds.is_some_and(|seconds| seconds > 0.0)), "{timing}");
        // Of what multiplies; the rest has no peak.
        let products = ["linear", "head", "attention"].contains(&timing["operation"].as_str().unwrap_or(""));
        assert_eq!(timing["instruction"].is_string(), products, "{timing}");
        assert_eq!(timing["share_of_peak"].as_f64().is_some_and(|share| share > 0.0), products, "{timing}");
    }
    // q+k+v of 4 and 2 and 2 heads of 32, hidden 128, 16 rows.
    assert_eq!(timings[0]["operations"], 2.0 * 16.0 * 256.0 * 128.0);
    let peaks = list(&written, "peaks");
    let used = |timing: &Value| peaks.iter().any(|peak| peak["instruction"] == timing["instruction"]);
    assert!(timings.iter().all(|timing| timing["instruction"].is_null() || used(timing)));
    assert!(peaks.iter().all(|peak| printed.contains(&text(peak, "instruction"))), "{printed}");
}

#[test]
fn a_window_of_a_made_model_is_finite_and_has_the_same_bits_again() {
    let session = Session::new();
    let schemes = "bf16,w4a16,w4a8,nvfp4,mxfp4a16,fp8,w8a8";
    let run = |threads: usize| {
        let line = format!(
            "-q bench --window {TINY} --layers 2 --ctx 32 --scored 8 --scheme {schemes} --acts off,library,kernel --compute bf16,f32 --threads {threads}"
        );
        session.ctq(&line).expect(0);
        session.json("b.json")
    };
    let (one, two) = (run(1), run(2));
    let windows = list(&one, "windows");
    // Three schemes do not quantize activations.
    assert_eq!(windows.len(), (7 + 4 + 4) * 2);
    assert_snapshot!(keys(&windows[0]), @"shape scheme acts compute layers all_layers windows batch weights context scored layer_bytes seconds fastest_seconds slowest_seconds loading_seconds making_seconds net_seconds tokens_per_second operations floor_seconds share_of_floor embedding_seconds layer_seconds last_layer_seconds head_seconds all_layers_seconds peak_anonymous_bytes peak_resident_bytes mean_nll");
    for (window, again) in windows.iter().zip(list(&two, "windows")) {
        // Logits of unit variance over 320 words: ln 320 + 1/2 = 6.27.
        let nll = window["mean_nll"].as_f64().expect("a number");
        assert!((5.0..8.0).contains(&nll), "{window}");
        assert_eq!(window["mean_nll"], again["mean_nll"], "{window}");
        // 2 layers of 147,456 weights and 32 tokens; pairs of 32 tokens, 128 wide; 8 rows of a head of 320 x 128.
        assert_eq!(
            window["operations"],
            f64::from(2 * 147_456 * 32 * 2 + 2 * 32 * 32 * 128 * 2 + 2 * 8 * 320 * 128)
        );
        assert_eq!((&window["layers"], &window["all_layers"]), (&2.into(), &3.into()));
        let positive = |key: &str| window[key].as_f64().is_some_and(|value| value > 0.0);
        assert!(
            ["net_seconds", "floor_seconds", "share_of_floor", "layer_seconds"].into_iter().all(positive)
        );
    }
}

#[test]
fn windows_have_the_same_bits_wherever_their_layers_are() {
    let session = Session::new();
    let run = |options: &str| {
        session.ctq(&format!("-q bench --window {TINY} --ctx 32 --scored 8 --threads 2 {options}")).expect(0);
        list(&session.json("b.json"), "windows")[0].clone()
    };
    let one = run("");
    let places = ["nowhere", "host", "device"];
    let several = places.map(|place| run(&format!("--windows 5 --batch 64 --weights {place}")));
    for (place, window) in places.into_iter().zip(&several) {
        assert_eq!(window["mean_nll"], several[0]["mean_nll"], "{place}");
        assert_eq!(
            (&window["weights"], &window["windows"], &window["batch"]),
            (&place.into(), &5.into(), &64.into())
        );
        assert_eq!(window["operations"].as_f64(), one["operations"].as_f64().map(|of_one| 5.0 * of_one));
        // A round before is there where layers have to come to their place.
        assert_eq!(window["loading_seconds"].is_number(), place != "nowhere", "{window}");
        let tokens = window["tokens_per_second"].as_f64().expect("a rate")
            * window["net_seconds"].as_f64().expect("seconds");
        assert!((tokens - 5.0 * 32.0).abs() < 1e-6, "{window}");
    }
    assert_ne!(one["mean_nll"], several[0]["mean_nll"], "windows differ");
}

#[test]
fn attention_is_measured_for_other_heads_and_windows_than_the_models() {
    let session = Session::new();
    session
        .ctq(&format!("-q bench {TINY} --only attention --heads 6/3/16 --ctx 24 --rows 48 --compute bf16"))
        .expect(0);
    let written = session.json("b.json");
    let [timing] = list(&written, "timings") else { panic!("{written}") };
    assert_eq!(timing["what"], "6/3 heads of 16, 2 x 24");
    // Two products of half of the pairs of two windows, 96 wide.
    assert_eq!(timing["operations"], f64::from(2 * 2 * 24 * 24 * 96));
}

#[test]
fn a_conversion_is_held_against_copies_and_leaves_nothing() {
    let session = Session::with(&["W4A16"]);
    std::fs::create_dir(session.path("out")).expect("a folder");
    let line = "-q bench --convert W4A16 --out out --rounds 2 --threads 2 --json b.json";
    let printed = session.ctq(line).expect(0).stdout;
    assert!(printed.contains("copy until on disk"), "{printed}");
    let convert = &session.json("b.json")["convert"];
    let runs = list(convert, "runs");
    assert_eq!(runs.len(), 3);
    assert_snapshot!(keys(&runs[0]), @"what read_bytes written_bytes seconds fastest_seconds slowest_seconds bytes_per_second convert_ratio");
    let shard = std::fs::metadata(session.path("W4A16/model.safetensors")).expect("a shard").len();
    assert!(runs.iter().all(|run| run["read_bytes"] == shard), "{convert}");
    assert!(runs[1..].iter().all(|run| run["written_bytes"] == shard), "{convert}");
    assert!(runs[0]["written_bytes"].as_u64().is_some_and(|bytes| bytes > shard / 2), "{convert}");
    let rate = |run: &Value| run["bytes_per_second"].as_f64().expect("a rate");
    for run in runs {
        let ratio = run["convert_ratio"].as_f64().expect("a ratio");
        assert!((rate(&runs[0]) / rate(run) / ratio - 1.0).abs() < 1e-9, "{convert}");
    }
    assert_eq!(std::fs::read_dir(session.path("out")).expect("a folder").count(), 0);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let session = Session::new();
    for (line, told) in [
        ("bench --window --shape tiny --ctx 32 --scored 32", "score at most 31"),
        ("bench --window --shape tiny --ctx 32 --scored 8 --scheme w4a16 --acts kernel", "give --acts off"),
        ("bench --shape tiny --only linear --rows 16 --scheme bf16 --acts kernel", "give --acts off"),
        ("bench --window --ctx 1", "from 2 to 1048576"),
        ("bench --layers 2", "--window"),
        ("bench --weights host", "--window"),
        ("bench --window --heads 32/8/128", "cannot be used with"),
        ("bench --heads 32/5/128", "key heads that divide them"),
        ("bench --heads 32/8", "such as 32/8/128"),
        ("bench --window --collective", "cannot be used with"),
        ("bench --convert nowhere", "no such directory"),
        ("bench --convert nowhere --shape llama-1b", "cannot be used with"),
    ] {
        let refused = session.ctq(line).expect(2).stderr;
        assert!(refused.contains(told), "{line}: {refused}");
    }
}

#[cfg(unix)]
#[test]
fn a_signal_ends_a_measurement_that_keeps_nothing() {
    let session = Session::new();
    let line = "bench --window --shape tiny --ctx 32 --scored 8 --rounds 1000000 --threads 1 --log log.txt";
    let mut child = session.start(line);
    let under_way =
        || std::fs::read_to_string(session.path("log.txt")).is_ok_and(|log| log.contains("round 3 of"));
    assert!(wait_until(&mut child, under_way), "it ended by itself");
    signal(&child, "INT");
    let ran = session.wait(child).expect(3);
    let words = ran.last_words();
    assert!(words.contains("interrupted: nothing is kept, the same command starts again"), "{words}");
}

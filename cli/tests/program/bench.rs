//! `ctq bench --collective`: that everything is there, in a form that scripts rely on. How fast is no matter.

use insta::assert_snapshot;
use serde_json::Value;

use crate::session::Session;

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
    assert_eq!(written["bench_version"], 1);
    assert_snapshot!([keys(&written), keys(&written["team"]), keys(&written["collectives"][0])].join("\n"), @r"
    bench_version backend isa timings team collectives
    ranks devices threads floor
    operation what model tokens ranks bytes seconds fastest_seconds slowest_seconds floor_seconds
    ");
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

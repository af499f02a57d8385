//! kill -9 in the middle, and the same command again: it says that it goes on, and the result has the same bits as one
//! that nobody disturbed.

use crate::checkpoint::random_llama;
use crate::session::{Session, files_of, wait_until};

/// Many groups of few windows, each with hidden states on disk after every layer.
const SLOW: &str = "eval NVFP4 --data text.txt --preset hf-strided --ctx 256 --stride 64 --rows 150 --acts off \
                    --save-every 0 --memory 14M --json result.json";

#[test]
fn eval_that_is_killed_again_and_again() {
    let session = Session::with(&["NVFP4"]);
    session.ctq(SLOW).expect(0);
    let undisturbed = session.json("result.json")[0].clone();
    std::fs::remove_file(session.path("result.json")).expect("the result");

    // Before the first group is done, then after ever more of them.
    let saved = |extension: &str| {
        let folder = std::fs::read_dir(session.path("cache/eval")).into_iter().flatten().flatten();
        folder
            .filter(|e| e.path().extension().is_some_and(|x| x == extension))
            .find_map(|e| e.metadata().ok())
    };
    let mut killed = 0;
    for round in 0..4 {
        let before = saved("scores").map_or(0, |file| file.len());
        let mut child = session.start(SLOW);
        let reached = wait_until(&mut child, || match round {
            0 => saved("snapshot").is_some(),
            _ => saved("scores").map_or(0, |file| file.len()) > before,
        });
        if reached {
            std::thread::sleep(std::time::Duration::from_millis(3 * round));
            killed += u32::from(child.kill().is_ok());
        }
        session.wait(child);
    }
    assert!(killed >= 2, "the run is too short to be killed in its middle");
    assert!(!session.path("result.json").exists(), "a killed run has left a result");
    let last = session.ctq(SLOW).expect(0);
    assert!(last.stderr.contains("going on: "), "{}", last.stderr);
    let resumed = &session.json("result.json")[0];
    let bits = |record: &serde_json::Value, key: &str| record[key].as_f64().expect("a number").to_bits();
    for key in ["total_nll", "perplexity", "perplexity_error"] {
        assert_eq!(bits(resumed, key), bits(&undisturbed, key), "{key}");
    }
    for key in ["count", "protocol_id", "method_id", "windows"] {
        assert_eq!(resumed[key], undisturbed[key], "{key}");
    }
    assert!(saved("scores").is_none() && saved("snapshot").is_none(), "a complete run has left its state");
}

#[test]
fn eval_resumes_with_other_threads_ranks_and_memory() {
    let session = Session::with(&["NVFP4"]);
    session.ctq(SLOW).expect(0);
    let undisturbed = session.json("result.json")[0]["total_nll"].clone();
    let state = || std::fs::read_dir(session.path("cache/eval")).into_iter().flatten().flatten();
    let mut child = session.start(SLOW);
    let scored = || state().any(|entry| entry.path().extension().is_some_and(|x| x == "scores"));
    assert!(wait_until(&mut child, scored), "the run is too short to be killed in its middle");
    child.kill().expect("a kill");
    session.wait(child);
    let other =
        SLOW.replace("--memory 14M", "--memory 100M --threads 3 --tp 2").replace("--save-every 0", "");
    let last = session.ctq(&other).expect(0);
    assert!(last.stderr.contains("going on: "), "{}", last.stderr);
    assert_eq!(session.json("result.json")[0]["total_nll"], undisturbed);
}

#[test]
fn convert_that_is_killed() {
    let session = Session::new();
    random_llama(24, 384).write(&session, "model");
    session.ctq("-q convert model undisturbed --threads 1").expect(0);
    for killed_after in ["embedding", "layer-00002", "layer-00015"] {
        let mut child = session.start("convert model out --threads 1");
        let part = session.path("out").join(format!("{killed_after}.safetensors"));
        let reached = wait_until(&mut child, || part.exists());
        assert!(reached, "the conversion is too quick to be killed in its middle");
        child.kill().expect("a kill");
        session.wait(child);
        assert!(!session.path("out/ctq.json").exists(), "a killed conversion looks complete");
        let refused = session.ctq("inspect out").expect(2);
        assert!(refused.stderr.contains("run the same `ctq convert` again"), "{}", refused.stderr);
    }
    let last = session.ctq("convert model out --threads 2").expect(0);
    assert!(last.stderr.contains("going on: "), "{}", last.stderr);
    assert!(
        files_of(&session.path("out")) == files_of(&session.path("undisturbed")),
        "the containers differ"
    );
}

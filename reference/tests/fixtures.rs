//! The oracle against Hugging Face: logits of the fixtures, checkpoints of every storage format written by the real
//! libraries. They are found through `CTQ_TEST_ASSETS`, the folder that holds `fixtures/`.
#![expect(clippy::print_stderr, reason = "a skipped test says why, and the distances are worth reading")]

mod oracle;

use std::path::PathBuf;

use ctq_model::Checkpoint;
use oracle::Oracle;

#[test]
fn logits_are_those_of_hugging_face() {
    let Some(assets) = std::env::var_os("CTQ_TEST_ASSETS").map(PathBuf::from) else {
        eprintln!("skipped: CTQ_TEST_ASSETS does not name the folder that holds fixtures/");
        return;
    };
    let folders = oracle::folders(&assets.join("fixtures"));
    assert!(!folders.is_empty(), "no fixtures in {}", assets.display());
    let mut far = Vec::new();
    for folder in folders {
        let oracle = Oracle::read(&folder);
        let checkpoint = Checkpoint::open(&folder).expect("checkpoint");
        let (distances, bound) = (oracle.distances(&checkpoint), oracle.bound());
        eprintln!("{:28} {distances}, at most {bound:.1e}", oracle.name());
        if !distances.within(bound) {
            far.push(oracle.name().to_owned());
        }
    }
    assert!(far.is_empty(), "too far from the oracle: {}", far.join(", "));
}

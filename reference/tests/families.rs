//! The oracle against Hugging Face: logits of `golden/families`, a tiny checkpoint for every feature of an
//! architecture, under both spellings of its config where there are two.
#![expect(clippy::print_stderr, reason = "a skipped test says why, and the distances are worth reading")]

mod oracle;

use std::path::Path;

use ctq_model::checkpoint::TensorInfo;
use ctq_model::config::ModelConfig;
use ctq_model::{Checkpoint, Tensor, TensorSource};
use oracle::Oracle;

#[test]
fn logits_are_those_of_hugging_face() {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/families");
    if !families.is_dir() {
        eprintln!("skipped: there is no {}; golden/make_families.py makes it", families.display());
        return;
    }
    let mut far = Vec::new();
    for folder in oracle::folders(&families) {
        let oracle = Oracle::read(&folder);
        let checkpoint = Checkpoint::open(&folder).expect("checkpoint");
        check(&oracle, "config.json", &checkpoint, &mut far);
        let legacy = folder.join("config.legacy.json");
        if legacy.is_file() {
            let config =
                ModelConfig::parse(&legacy, std::fs::read(&legacy).expect("config")).expect("config");
            check(&oracle, "config.legacy.json", &Respelled { checkpoint, config }, &mut far);
        }
    }
    assert!(far.is_empty(), "too far from the oracle: {}", far.join(", "));
}

fn check(oracle: &Oracle, config: &str, source: &dyn TensorSource, far: &mut Vec<String>) {
    let (distances, bound) = (oracle.distances(source), oracle.bound());
    eprintln!("{:26} {config:18} {distances}, at most {bound:.1e}", oracle.name());
    if !distances.within(bound) {
        far.push(format!("{} ({config})", oracle.name()));
    }
}

/// A checkpoint under another spelling of its config.
struct Respelled {
    checkpoint: Checkpoint,
    config: ModelConfig,
}

impl TensorSource for Respelled {
    fn root(&self) -> &Path {
        self.checkpoint.root()
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn names(&self) -> Vec<&str> {
        self.checkpoint.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.checkpoint.info(name)
    }

    fn file_of(&self, name: &str) -> &Path {
        self.checkpoint.file_of(name)
    }

    fn tensor(&self, name: &str) -> ctq_model::Result<Option<Tensor<'_>>> {
        self.checkpoint.tensor(name)
    }
}

//! Checkpoints of every scheme, written by the real libraries, against logits by Hugging Face.

use ctq_tests::oracle::Oracle;
use ctq_tests::{assets, checks, models};

#[test]
fn logits_of_every_fixture_are_those_of_hugging_face() {
    let Some(fixtures) = assets::shared("fixtures") else { return };
    let folders = assets::with_oracle(&fixtures);
    assert!(folders.len() >= 18, "only {} fixtures in {}", folders.len(), fixtures.display());
    let mut complaints = Vec::new();
    for folder in folders {
        let out = tempfile::tempdir().expect("a temporary folder");
        let container = models::converted(&folder, &out.path().join("container"));
        complaints.extend(checks::complaints(
            &Oracle::read(&folder),
            &container,
            &models::on_the_fly(&folder),
        ));
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

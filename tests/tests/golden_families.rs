//! One small checkpoint for each feature of an architecture against logits by Hugging Face, under both spellings of
//! its config where there are two.

use std::fs;
use std::path::Path;

use ctq_tests::oracle::Oracle;
use ctq_tests::{assets, checks, models};

#[test]
fn logits_of_every_family_are_those_of_hugging_face() {
    let folders = assets::with_oracle(&assets::golden("families"));
    assert!(folders.len() >= 18, "only {} families", folders.len());
    let complaints: Vec<String> = folders.iter().flat_map(|folder| complaints(folder)).collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn the_older_spelling_of_a_config_says_the_same() {
    let mut found = 0;
    for folder in assets::with_oracle(&assets::golden("families")) {
        if !folder.join("config.legacy.json").is_file() {
            continue;
        }
        found += 1;
        let parent = tempfile::tempdir().expect("a temporary folder");
        let respelled = parent.path().join(assets::name(&folder));
        copy(&folder, &respelled);
        fs::rename(respelled.join("config.legacy.json"), respelled.join("config.json")).expect("renamed");
        let complaints = complaints(&respelled);
        assert!(complaints.is_empty(), "with the older spelling: {}", complaints.join("\n"));
    }
    assert!(found >= 7, "only {found} families have two spellings");
}

fn complaints(folder: &Path) -> Vec<String> {
    let out = tempfile::tempdir().expect("a temporary folder");
    let container = models::converted(folder, &out.path().join("container"));
    checks::complaints(&Oracle::read(folder), &container, &models::on_the_fly(folder))
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a new folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("directory entry").path();
        fs::copy(&path, to.join(assets::name(&path))).expect("copied");
    }
}

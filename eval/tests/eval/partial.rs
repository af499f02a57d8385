//! Saved scores come back bit for bit, or not at all.

use ctq_eval::Error;
use ctq_eval::partial::{Saved, load, path, remove, save};
use ctq_model::window::WindowScores;
use proptest::prelude::*;

fn some_scores() -> Vec<WindowScores> {
    vec![
        WindowScores { window: 0, first: 1, nll: vec![0.1, -0.0, f64::MIN_POSITIVE, 1e300] },
        WindowScores { window: 3, first: 256, nll: vec![] },
    ]
}

fn ignored(saved: Saved) -> String {
    match saved {
        Saved::Ignored { reason } => reason,
        Saved::Nothing | Saved::Scores(_) => panic!("trusted: {saved:?}"),
    }
}

#[test]
fn saved_scores_are_found_replaced_and_removed() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cache = directory.path().join("resume");
    assert_eq!(load(&cache, "a.b-c_1").expect("a key"), Saved::Nothing);
    save(&cache, "a.b-c_1", &some_scores()).expect("saved");
    assert_eq!(load(&cache, "a.b-c_1").expect("a key"), Saved::Scores(some_scores()));
    save(&cache, "a.b-c_1", &some_scores()[..1]).expect("saved");
    assert_eq!(load(&cache, "a.b-c_1").expect("a key"), Saved::Scores(some_scores()[..1].to_vec()));
    assert_eq!(std::fs::read_dir(&cache).expect("a directory").count(), 1);
    remove(&cache, "a.b-c_1").expect("removed");
    remove(&cache, "a.b-c_1").expect("nothing to remove");
    assert_eq!(load(&cache, "a.b-c_1").expect("a key"), Saved::Nothing);
}

#[test]
fn damaged_and_foreign_files_are_ignored_with_a_reason() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    save(directory.path(), "mine", &some_scores()).expect("saved");
    let file = path(directory.path(), "mine").expect("a path");
    let whole = std::fs::read(&file).expect("bytes");
    for length in 0..whole.len() {
        std::fs::write(&file, &whole[..length]).expect("a shorter file");
        ignored(load(directory.path(), "mine").expect("a key"));
    }
    for place in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[place] ^= 1;
        std::fs::write(&file, &flipped).expect("a damaged file");
        assert!(ignored(load(directory.path(), "mine").expect("a key")).contains("mine.scores"));
    }
    std::fs::write(path(directory.path(), "yours").expect("a path"), &whole).expect("a foreign file");
    let reason = ignored(load(directory.path(), "yours").expect("a key"));
    assert!(reason.contains("another evaluation"), "{reason}");
}

#[test]
fn keys_stay_inside_the_directory() {
    for key in ["", ".hidden", "../up", "a/b", "a b", "ä"] {
        assert!(matches!(path(std::path::Path::new("x"), key), Err(Error::BadKey { .. })), "{key:?}");
    }
}

proptest! {
    #[test]
    fn every_bit_pattern_survives(bits in prop::collection::vec(any::<u64>(), 0..40), first in 1..9_usize) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let nll = bits.iter().copied().map(f64::from_bits).collect();
        save(directory.path(), "k", &[WindowScores { window: 5, first, nll }]).expect("saved");
        let Saved::Scores(found) = load(directory.path(), "k").expect("a key") else { panic!("not found") };
        prop_assert_eq!((found[0].window, found[0].first), (5, first));
        prop_assert_eq!(found[0].nll.iter().map(|nll| nll.to_bits()).collect::<Vec<_>>(), bits);
    }
}

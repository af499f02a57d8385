//! The cache of compiled kernels: what was stored comes back whole or not at all.

use std::process::{Command, Stdio};
use std::thread;

use super::*;

fn cache() -> (tempfile::TempDir, CubinCache) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = CubinCache::new(&folder.path().join("not/there/yet"));
    (folder, cache)
}

#[test]
fn what_was_stored_comes_back() {
    let (_folder, cache) = cache();
    assert_eq!(cache.load("a"), None);
    for cubin in [&b""[..], b"machine code"] {
        cache.store("a", cubin).expect("stored");
        assert_eq!(cache.load("a").as_deref(), Some(cubin));
    }
    assert_eq!(cache.load("b"), None);
}

#[test]
fn a_damaged_entry_is_none() {
    let (_folder, cache) = cache();
    cache.store("a", b"machine code").expect("stored");
    let whole = fs::read(cache.path("a")).expect("an entry");
    for length in 0..whole.len() {
        fs::write(cache.path("a"), &whole[..length]).expect("written");
        assert_eq!(cache.load("a"), None, "cut to {length} bytes");
    }
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(cache.path("a"), damaged).expect("written");
        assert_eq!(cache.load("a"), None, "byte {at} is wrong");
    }
    cache.store("a", b"machine code").expect("stored over it");
    assert_eq!(cache.load("a").as_deref(), Some(&b"machine code"[..]));
}

#[test]
fn many_may_write_and_read_at_once() {
    let (_folder, cache) = cache();
    let contents: Vec<Vec<u8>> = (0..8_u8).map(|n| vec![n; 100_000 + usize::from(n)]).collect();
    thread::scope(|scope| {
        for content in &contents {
            scope.spawn(|| {
                for _ in 0..20 {
                    cache.store("a", content).expect("stored");
                    let loaded = cache.load("a").expect("always whole, whoever wrote it");
                    assert!(contents.contains(&loaded));
                }
            });
        }
    });
    let left: Vec<_> = fs::read_dir(&cache.folder).expect("the folder").flatten().collect();
    assert_eq!(left.len(), 1, "temporary files are left: {left:?}");
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("file");
    fs::write(&file, "").expect("a file");
    // A file where the folder should be: nobody can write there, whatever their rights.
    let cache = CubinCache::new(&file);
    assert!(cache.store("a", b"machine code").is_err());
    assert_eq!(cache.load("a"), None);
    // A folder in the place of the entry: the rename fails.
    let cache = CubinCache::new(folder.path());
    fs::create_dir_all(cache.path("a").join("full")).expect("a folder");
    assert!(cache.store("a", b"machine code").is_err());
    assert_eq!(fs::read_dir(&cache.folder).expect("the folder").count(), 1);
}

#[test]
fn keys_tell_lists_of_parts_apart() {
    let keys = [key(&[b"ab", b"c"]), key(&[b"a", b"bc"]), key(&[b"abc"]), key(&[b"ab", b"c", b""])];
    for (index, key) in keys.iter().enumerate() {
        assert!(key.len() == 64 && !keys[..index].contains(key), "{keys:?}");
    }
    assert_eq!(keys[0], key(&[b"ab", b"c"]));
}

/// Names the folder that a child process is to write to, and the child.
const SHARED: &str = "CTQ_TEST_SHARED_CACHE";

#[test]
fn many_processes_may_write_and_read_at_once() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = CubinCache::new(folder.path());
    let child = |number: usize| {
        Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "cuda::driver::cubin_cache::tests::write_and_read_as_one_of_many"])
            .env(SHARED, format!("{number}:{}", folder.path().display()))
            .stdout(Stdio::null())
            .spawn()
            .expect("a child process")
    };
    let children: Vec<_> = (0..6).map(child).collect();
    for mut child in children {
        assert!(child.wait().expect("an end").success());
    }
    assert!(cache.load("entry").is_some());
    assert_eq!(std::fs::read_dir(folder.path().join("kernels")).expect("a folder").count(), 1);
}

/// The body of the child processes: does nothing where it is not one.
#[test]
fn write_and_read_as_one_of_many() {
    let Ok(shared) = std::env::var(SHARED) else { return };
    let (number, folder) = shared.split_once(':').expect("a number and a folder");
    let number: u8 = number.parse().expect("a number");
    let cache = CubinCache::new(Path::new(folder));
    for _ in 0..100 {
        cache.store("entry", &vec![number; 50_000 + usize::from(number)]).expect("stored");
        let found = cache.load("entry").expect("a whole entry, of whichever process");
        assert!(found.iter().all(|byte| *byte == found[0]) && found.len() == 50_000 + usize::from(found[0]));
    }
}

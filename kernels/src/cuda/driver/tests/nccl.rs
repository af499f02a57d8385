//! The library where this machine has it: what works without a device.
#![expect(clippy::print_stdout, reason = "says what a test found, or why it is skipped")]

use super::*;

#[test]
fn the_library_tells_its_version_and_makes_ids_without_a_device() {
    let found = match find(&Places::of_this_machine()) {
        Ok(found) => found,
        Err(missing) => return println!("skipped: NCCL is {missing}"),
    };
    let library = NcclLibrary::load(&found.path).expect("it was loaded before");
    println!("NCCL {} in {} ({})", found.version, found.path.display(), found.origin);
    assert_eq!(library.version(), found.version);
    assert_eq!(found.version.major, 2);
    match (library.unique_id(), library.unique_id()) {
        (Ok(one), Ok(other)) => {
            assert!(one != other, "two ids are alike");
            assert_eq!(UniqueId::from_bytes(one.bytes()), one);
        }
        // A machine without a network that it could meet on.
        (one, other) => println!("no id: {one:?}, {other:?}"),
    }
}

#[test]
fn refusals_say_what_the_library_says() {
    let Ok(found) = find(&Places::of_this_machine()) else { return println!("skipped: there is no NCCL") };
    let library = NcclLibrary::load(&found.path).expect("it was loaded before");
    for fine in [SUCCESS, IN_PROGRESS] {
        assert_eq!(library.check(fine, "a call"), Ok(()));
    }
    let refused = library.check(4, "a call").expect_err("an error");
    let Refused::Here(what) = refused else { panic!("{refused:?}") };
    // Newer versions go on with how to learn more.
    assert!(what.starts_with(&format!("NCCL {}: a call: invalid argument", found.version)), "{what}");
    assert!(matches!(library.check(REMOTE_ERROR, "a call"), Err(Refused::Remote(_))));
}

#[test]
fn what_is_no_nccl_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("libnccl.so.2");
    std::fs::write(&file, "no library").expect("a file");
    assert!(NcclLibrary::load(&file).expect_err("no library").contains("file too short"));
    let error = NcclLibrary::load(Path::new("libm.so.6")).expect_err("another library");
    assert_eq!(error, "it has no function `ncclGetVersion`");
}

//! The kernels' sources through the real NVRTC, where this machine has one: `VIRTUAL_ENV`, `CTQ_NVRTC` or the loader's
//! path may lead to it. A GPU is not needed.
#![expect(clippy::print_stdout, reason = "says what a test found, or why it is skipped")]

use std::collections::BTreeSet;
use std::time::Instant;

use rayon::prelude::*;

use super::*;
use crate::cuda::driver::library::Places;
use crate::cuda::driver::sources::UNITS;

/// As a driver of the newest CUDA.
const MAJOR: u32 = 13;

fn nvrtc() -> Option<Nvrtc> {
    match Nvrtc::find(&Places::of_this_machine(), MAJOR) {
        Ok((nvrtc, found)) => {
            println!("NVRTC {}: {}", found.version, found.path.display());
            Some(nvrtc)
        }
        Err(missing) => {
            println!("skipped: no NVRTC: {missing}, looked in {:?}", missing.looked_in);
            None
        }
    }
}

/// Names before `_launch` in a CUBIN: its kernels.
fn kernels_of(cubin: &[u8]) -> BTreeSet<String> {
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let words = cubin.split(|byte| !is_name(byte)).filter_map(|word| str::from_utf8(word).ok());
    words
        .filter_map(|word| word.strip_suffix("_launch"))
        .filter(|n| !n.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Each file for one target, another for each, because a file may take seconds; with `CTQ_TEST_ALL_TARGETS` each for all.
#[test]
fn every_file_compiles() {
    let Some(nvrtc) = nvrtc() else { return };
    let capabilities = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)];
    let known = capabilities.into_iter().filter_map(|c| architecture::best(c, &nvrtc.targets));
    let targets: BTreeSet<String> = known.collect();
    assert!(targets.contains("sm_80"), "{targets:?}");
    const HOPPER: &str = "sm_90a";
    let all = std::env::var_os("CTQ_TEST_ALL_TARGETS").is_some();
    let pairs = UNITS.iter().enumerate().flat_map(|(place, unit)| {
        // What is written for Hopper holds nothing for others.
        let own =
            unit.text.contains("#if HOPPER").then(|| targets.iter().position(|target| target == HOPPER));
        let one = own.flatten().unwrap_or(place % targets.len());
        let targets = targets.iter().enumerate().filter(move |(index, _)| all || *index == one);
        let targets = targets.collect::<Vec<_>>();
        targets.into_iter().map(move |(_, target)| (unit, target))
    });
    let work: Vec<(&Source, &String)> = pairs.collect();
    work.par_iter().for_each(|(unit, target)| {
        let mut options = options(target);
        options.push("--ptxas-options=-warn-spills".to_owned());
        let started = Instant::now();
        let cubin =
            nvrtc.compile(**unit, HEADERS, &options).unwrap_or_else(|error| panic!("{target}: {error}"));
        println!("{} for {target}: {:.1} s", unit.name, started.elapsed().as_secs_f64());
        assert!(cubin.starts_with(b"\x7fELF"), "{}", unit.name);
        let found = kernels_of(&cubin);
        if unit.text.contains("#if HOPPER") && *target != HOPPER {
            return;
        }
        for kernel in unit.kernels() {
            assert!(found.contains(kernel), "{} for {target} has no `{kernel}`: {found:?}", unit.name);
        }
    });
}

#[test]
fn an_error_names_the_file_and_says_what_the_compiler_says() {
    let Some(nvrtc) = nvrtc() else { return };
    let unit =
        Source { name: "broken.cu", text: "#include \"arch.cuh\"\nDEV u32 two() { return nothing; }\n" };
    let error = nvrtc.compile(unit, HEADERS, &options("sm_80")).expect_err("it is broken");
    assert!(error.starts_with("broken.cu: nvrtcCompileProgram: NVRTC_ERROR_COMPILATION: "), "{error}");
    assert!(error.contains("\"nothing\" is undefined"), "{error}");
}

#[test]
fn a_compiled_file_is_kept_and_a_damaged_one_is_compiled_again() {
    let Some(nvrtc) = nvrtc() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let compiler = Compiler::nvrtc("sm_80".to_owned(), nvrtc, Some(folder.path()));
    let unit = UNITS.iter().find(|unit| unit.name == "elementwise.cu").expect("there is such a file");
    let first = compiler.cubin(*unit).expect("compiled");
    let entries: Vec<_> =
        std::fs::read_dir(folder.path().join("kernels")).expect("a cache").flatten().collect();
    let [entry] = &entries[..] else { panic!("{entries:?}") };
    let whole = std::fs::read(entry.path()).expect("an entry");
    assert!(whole.starts_with(&first));
    // What is in the cache is what is loaded.
    let key = entry.file_name().to_string_lossy().trim_end_matches(".cubin").to_owned();
    CubinCache::new(folder.path()).store(&key, b"from the cache").expect("stored");
    assert_eq!(compiler.cubin(*unit).as_deref(), Ok(&b"from the cache"[..]));
    std::fs::write(entry.path(), &whole[..whole.len() / 2]).expect("written");
    assert_eq!(compiler.cubin(*unit).as_deref(), Ok(&*first));
    assert_eq!(std::fs::read(entry.path()).expect("an entry"), whole);
    assert_eq!(compiler.take_notes(), [""; 0]);
}

#[test]
fn without_a_cache_that_can_be_written_it_compiles_and_says_so_once() {
    let Some(nvrtc) = nvrtc() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("a file");
    let compiler = Compiler::nvrtc("sm_80".to_owned(), nvrtc, Some(&file));
    let unit = UNITS.iter().find(|unit| unit.name == "elementwise.cu").expect("there is such a file");
    for _ in 0..2 {
        assert!(compiler.cubin(*unit).expect("compiled").starts_with(b"\x7fELF"));
    }
    let notes = compiler.take_notes();
    assert!(notes.len() == 1 && notes[0].starts_with("compiled kernels cannot be kept"), "{notes:?}");
    assert_eq!(compiler.take_notes(), [""; 0]);
}

#[test]
fn built_in_code_serves_its_target_and_no_later_one_with_features_of_its_own() {
    let targets = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"].map(str::to_owned);
    let best = |capability| prebuilt_for(capability, &targets);
    assert_eq!(best((8, 0)).as_deref(), Some("sm_80"));
    assert_eq!(best((8, 7)).as_deref(), Some("sm_86"));
    assert_eq!(best((9, 0)).as_deref(), Some("sm_90a"));
    assert_eq!(best((10, 3)), None);
    assert_eq!(best((12, 1)), None);
}

/// With the feature, all of it is there.
#[test]
fn built_in_code_is_complete() {
    for target in prebuilt_targets() {
        for unit in UNITS {
            let cubin = Compiler::prebuilt(target.clone()).cubin(*unit).expect("built in");
            let found = kernels_of(&cubin);
            assert!(
                unit.kernels().all(|kernel| found.contains(kernel)),
                "{} for {target}: {found:?}",
                unit.name
            );
        }
    }
    assert_eq!(prebuilt_targets().is_empty(), cfg!(not(feature = "prebuilt")));
}

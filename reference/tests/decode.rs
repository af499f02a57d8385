//! Decompressed weights against `golden/decode`: one module a storage format, with what compressed-tensors itself
//! decompresses, bit for bit.
#![expect(clippy::print_stderr, reason = "a skipped test says why")]

mod single_module;

use std::path::Path;

use ctq_model::{DType, Inventory};
use ctq_reference::Reference;
use half::{bf16, f16};
use safetensors::SafeTensors;
use serde_json::Value;
use single_module::{MODULE, SingleModule};

/// Cases that ctq refuses when it reads the checkpoint, with a word of the refusal.
const REFUSED: &[(&str, &str)] = &[
    ("mxfp6", "mxfp6-pack-quantized"),
    ("mxfp6-fuzz", "mxfp6-pack-quantized"),
    ("nvfp4-fuzz-unit-divisor", "weight_global_scale"),
];

#[test]
fn weights_are_bit_for_bit_those_of_compressed_tensors() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/decode");
    if !folder.is_dir() {
        eprintln!("skipped: there is no {}; golden/make_decode.py makes it", folder.display());
        return;
    }
    let mut cases = 0;
    for entry in std::fs::read_dir(&folder).expect("goldens") {
        let path = entry.expect("directory entry").path();
        if path.extension().is_some_and(|extension| extension == "json") {
            check(&path);
            cases += 1;
        }
    }
    assert!(cases >= 60, "only {cases} goldens in {}", folder.display());
}

fn check(path: &Path) {
    let case = path.file_stem().and_then(|stem| stem.to_str()).expect("a file name");
    let about: Value = serde_json::from_slice(&std::fs::read(path).expect("golden")).expect("JSON");
    let bytes = std::fs::read(path.with_extension("safetensors")).expect("golden");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let expected = tensors.tensor("expected").expect("expected");
    let shape = (expected.shape()[0], expected.shape()[1]);
    let source = SingleModule::new(path, shape, &about["config_group"], &tensors, |leaf| leaf != "expected");
    let inventory = match (Inventory::read(&source, &[]), REFUSED.iter().find(|(name, _)| *name == case)) {
        (Ok(inventory), None) => inventory,
        (Err(error), Some((_, why))) if error.to_string().contains(why) => return,
        (Ok(_), Some(_)) => panic!("{case} is read, and it is listed as refused"),
        (Err(error), _) => panic!("{case}: {error}"),
    };
    let found = Reference::open(&source, &inventory).and_then(|reference| reference.weight(MODULE));
    let found = found.unwrap_or_else(|error| panic!("{case}: {error}"));
    assert_eq!((found.n, found.k), shape, "{case}");
    let found_bytes = stored(found.dtype, &found.values);
    assert_eq!(format!("{:?}", expected.dtype()), found.dtype.name(), "{case}");
    let width = found.dtype.bytes();
    let pairs = found_bytes.chunks_exact(width).zip(expected.data().chunks_exact(width));
    let wrong: Vec<usize> =
        pairs.enumerate().filter(|(_, (found, expected))| found != expected).map(|(at, _)| at).collect();
    assert!(wrong.is_empty(), "{case}: {} weights differ, the first at {}", wrong.len(), wrong[0]);
    assert_eq!(found_bytes.len(), expected.data().len(), "{case}");
}

/// Values in the dtype they are exact in, little-endian.
fn stored(dtype: DType, values: &[f32]) -> Vec<u8> {
    if dtype == DType::BF16 {
        values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
    } else if dtype == DType::F16 {
        values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect()
    } else {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }
}

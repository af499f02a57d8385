//! Bad input: each kind is refused with a message that names file, tensor, place and next step.

mod checkpoints;

use std::fs;
use std::path::{Path, PathBuf};

use checkpoints::{GATE, Stored, Tiny, convert_to, int_group, options};
use ctq_container::{Container, ErrorKind, LayerSource};
use ctq_model::DType;
use ctq_model::inventory::Part;
use insta::assert_snapshot;
use serde_json::json;

/// Converts, expects a refusal, and gives its message without the directory.
fn refused(tiny: &Tiny) -> String {
    let source = tiny.write();
    let work = tempfile::tempdir().unwrap();
    let error = convert_to(source.path(), &work.path().join("out"), &options(2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Input);
    // On the fly the same values are refused.
    let tiled = ctq_convert::TiledCheckpoint::open(source.path(), &[]);
    let parts =
        tiled.map(|tiled| tiled.inventory().parts().try_for_each(|(part, _)| tiled.part(part).map(drop)));
    assert!(!matches!(parts, Ok(Ok(()))));
    error.to_string().replace(source.path().to_str().unwrap(), "DIR")
}

#[test]
fn scales_that_are_not_numbers() {
    let mut tiny = Tiny::int4(33, 64);
    tiny.gate("weight_scale").bytes[10..12].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    assert_snapshot!(refused(&tiny), @"DIR/model.safetensors: tensor `model.layers.0.mlp.gate_proj.weight_scale`: row 2, column 1: the scale is NaN; download the checkpoint again, or quantize the model again");
    tiny.gate("weight_scale").bytes[10..12].copy_from_slice(&0xff80_u16.to_le_bytes());
    assert!(refused(&tiny).contains("row 2, column 1: the scale is infinite"));
}

#[test]
fn weights_and_vectors_that_are_not_numbers() {
    let mut tiny = Tiny::int4(33, 64);
    let up = tiny.tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap();
    up.bytes[2 * (64 * 7 + 3)..][..2].copy_from_slice(&0x7f80_u16.to_le_bytes());
    assert!(
        refused(&tiny)
            .contains("`model.layers.0.mlp.up_proj.weight`: row 7, column 3: the weight is infinite")
    );

    let mut tiny = Tiny::int4(33, 64);
    let norm = tiny.tensors.get_mut("model.norm.weight").unwrap();
    norm.bytes[126..].copy_from_slice(&0x7f81_u16.to_le_bytes());
    assert!(refused(&tiny).contains("`model.norm.weight`: element 63 is NaN"));
}

fn float_group(format: &str, bits: u8, weights: &serde_json::Value) -> serde_json::Value {
    let mut group = int_group(bits, true);
    group["format"] = format.into();
    group["weights"]["type"] = "float".into();
    for (key, value) in weights.as_object().unwrap() {
        group["weights"][key] = value.clone();
    }
    group
}

#[test]
fn fp8_weights_and_scales_that_are_not_numbers() {
    let group = float_group("float-quantized", 8, &json!({ "strategy": "channel", "group_size": null }));
    let gate = [
        ("weight", Stored::new(DType::F8E4M3, &[3, 32], vec![0x38; 96])),
        ("weight_scale", Stored::bf16(&[3, 1])),
    ];
    let mut tiny = Tiny::new(3, 32, &group, &gate);
    tiny.gate("weight").bytes[33] = 0xff;
    assert!(refused(&tiny).contains("gate_proj.weight`: row 1, column 1: the weight is NaN"));
}

#[test]
fn nvfp4_scales_and_divisors() {
    let group =
        float_group("nvfp4-pack-quantized", 4, &json!({ "strategy": "tensor_group", "group_size": 16 }));
    let gate = [
        ("weight_packed", Stored::new(DType::U8, &[3, 16], vec![0x21; 48])),
        ("weight_scale", Stored::new(DType::F8E4M3, &[3, 2], vec![0x38; 6])),
        ("weight_global_scale", Stored::new(DType::F32, &[1], 100.0_f32.to_le_bytes())),
    ];
    let mut tiny = Tiny::new(3, 32, &group, &gate);
    for (value, flaw) in
        [(0.0_f32, "is zero"), (-0.0, "is zero"), (f32::NAN, "is NaN"), (f32::INFINITY, "is infinite")]
    {
        tiny.gate("weight_global_scale").bytes = value.to_le_bytes().to_vec();
        let message = refused(&tiny);
        assert!(
            message.contains(&format!("weight_global_scale`: {flaw}, and every scale is divided by it")),
            "{message}"
        );
    }
    let mut tiny = Tiny::new(3, 32, &group, &gate);
    tiny.gate("weight_scale").bytes[5] = 0x7f;
    assert!(refused(&tiny).contains("weight_scale`: row 2, column 1: the scale is NaN"));
}

#[test]
fn e8m0_scales() {
    let weights = json!({ "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8" });
    let group = float_group("mxfp4-pack-quantized", 4, &weights);
    let gate = [
        ("weight_packed", Stored::new(DType::U8, &[3, 16], vec![0x21; 48])),
        ("weight_scale", Stored::new(DType::U8, &[3, 1], vec![127, 255, 127])),
    ];
    let message = refused(&Tiny::new(3, 32, &group, &gate));
    assert!(message.contains("weight_scale`: row 1, column 0: the scale is NaN (exponent 255)"), "{message}");
}

#[test]
fn integers_that_do_not_fit_their_stated_width() {
    let mut group = int_group(4, true);
    group["format"] = "int-quantized".into();
    let mut codes = vec![7; 96];
    codes[40] = 8;
    let gate = [("weight", Stored::new(DType::I8, &[3, 32], codes)), ("weight_scale", Stored::bf16(&[3, 1]))];
    let message = refused(&Tiny::new(3, 32, &group, &gate));
    assert!(
        message.contains("gate_proj.weight`: row 1, column 8: the code 8 does not fit the 4 bits"),
        "{message}"
    );
}

/// A finished container to do mischief to.
fn container() -> (tempfile::TempDir, PathBuf) {
    let source = Tiny::int4(33, 64).write();
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("out");
    convert_to(source.path(), &out, &options(1)).unwrap();
    (work, out)
}

fn opening(out: &Path) -> String {
    Container::open(out).unwrap_err().to_string().replace(out.to_str().unwrap(), "OUT")
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_flipped_bit_in_a_part_is_found_by_its_hash() {
    let (_work, out) = container();
    edit(&out.join("layer-00000.safetensors"), |bytes| *bytes.last_mut().unwrap() ^= 1);
    let container = Container::open(&out).unwrap();
    let error = container.verify_hashes().unwrap_err().to_string();
    assert!(error.contains("layer-00000.safetensors: its SHA-256 is "), "{error}");
    assert!(container.verify_part(Part::Head).is_ok());
    edit(&out.join("layer-00000.safetensors"), |bytes| {
        *bytes.last_mut().unwrap() ^= 1;
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header] ^= 1;
    });
    let report = ctq_convert::check_round_trip(&container, None).unwrap();
    assert_eq!(report.mismatches.len(), 1);
    assert!(ctq_convert::restore(&container, &out.with_file_name("restored")).is_err());
    assert!(!out.with_file_name("restored").exists());
}

#[test]
fn missing_truncated_and_foreign_files() {
    let (_work, out) = container();
    let layer = out.join("layer-00000.safetensors");
    let whole = fs::read(&layer).unwrap();
    edit(&layer, |bytes| bytes.truncate(5000));
    assert!(opening(&out).starts_with("OUT/layer-00000.safetensors: truncated or replaced: 5000 bytes of "));
    fs::remove_file(&layer).unwrap();
    assert_snapshot!(opening(&out), @"OUT/layer-00000.safetensors: this file of the container is missing; copy the container again, or convert it again with --force");
    fs::write(&layer, vec![0; whole.len()]).unwrap();
    let error = Container::open(&out).unwrap().part(Part::Layer(0)).unwrap_err().to_string();
    assert!(error.contains("not a valid safetensors file"), "{error}");
    fs::write(&layer, whole).unwrap();
    Container::open(&out).unwrap().part(Part::Layer(0)).unwrap();
}

#[test]
fn manifests_of_other_kinds() {
    let (_work, out) = container();
    let manifest = out.join("ctq.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replacen("\"format_version\": 1", "\"format_version\": 9", 1)).unwrap();
    assert_snapshot!(opening(&out), @"OUT/ctq.json: container format version 9, and this ctq reads version 1; convert the checkpoint again, or use the ctq that wrote it");
    fs::write(&manifest, text.replacen("ctq-container", "other", 1)).unwrap();
    assert_snapshot!(opening(&out), @"OUT is not a ctq container: its ctq.json does not say `format: ctq-container`; give a folder that `ctq convert` has written");
    fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    assert!(opening(&out).starts_with("OUT is not a ctq container: its ctq.json is not a JSON object"));
    fs::write(&manifest, text.replacen("layer-00000.safetensors", "../layer.safetensors", 1)).unwrap();
    assert!(opening(&out).contains("names `../layer.safetensors` as the file of layer 0"));
    fs::write(&manifest, text.replacen("\"n\": 33", "\"n\": 9223372036854775807", 1)).unwrap();
    assert!(opening(&out).contains("has an impossible shape or scheme"));
    fs::write(&manifest, text.replacen("\"n\": 33", "\"n\": 34", 1)).unwrap();
    let error = Container::open(&out).unwrap().part(Part::Layer(0)).unwrap_err().to_string();
    assert!(
        error.contains(&format!("matrix `{GATE}` is not the one that the manifest describes")),
        "{error}"
    );
    fs::remove_file(&manifest).unwrap();
    assert_snapshot!(opening(&out), @"OUT is not a ctq container: it has no ctq.json; give a folder that `ctq convert` has written");
}

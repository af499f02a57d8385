//! What the tiles do not hold is kept beside them: dirty tails, unused zero points, idle group indices, odd shapes.

mod checkpoints;

use checkpoints::{GATE, Stored, Tiny, assert_lossless, convert_to, int_group, options};
use ctq_container::{Container, Origin};
use ctq_model::DType;
use serde_json::json;

fn origin(container: &Container, leaf: &str) -> Origin {
    let name = format!("{GATE}.{leaf}");
    let mut tensors = container.manifest().parts.iter().flat_map(|part| &part.tensors);
    tensors.find(|tensor| tensor.name == name).unwrap().origin
}

#[test]
fn a_clean_module_needs_nothing_beside_its_tiles() {
    let container = assert_lossless(Tiny::int4(33, 64).write().path(), 1);
    for leaf in ["weight_packed", "weight_scale", "weight_shape"] {
        assert_eq!(origin(&container, leaf), Origin::Tiles);
    }
}

#[test]
fn dirty_tail_bits_are_kept_one_by_one() {
    // 33 rows of 68 columns of 4 bits: 9 words, the last half empty.
    let mut tiny = Tiny::int4(33, 64);
    let group = json!({ "strategy": "channel", "group_size": null });
    tiny = Tiny::new(33, 68, &with_weights(int_group(4, true), &group), &channel_gate(&mut tiny));
    let clean = assert_lossless(tiny.write().path(), 1);
    assert_eq!(origin(&clean, "weight_packed"), Origin::Tiles);
    tiny.gate("weight_packed").bytes[9 * 4 - 1] = 0xa0;
    tiny.gate("weight_packed").bytes[33 * 9 * 4 - 2] = 0x01;
    let dirty = assert_lossless(tiny.write().path(), 1);
    assert_eq!(origin(&dirty, "weight_packed"), Origin::TilesWithExceptions);
    for byte in tiny.gate("weight_packed").bytes.chunks_exact_mut(9 * 4) {
        byte[34..].fill(0xff);
        byte[0] = 0;
    }
    let filthy = assert_lossless(tiny.write().path(), 1);
    assert_eq!(origin(&filthy, "weight_packed"), Origin::TilesWithExceptions);
}

/// The tensors of a [33, 68] int4 module with a scale a row, its tails clean.
fn channel_gate(tiny: &mut Tiny) -> Vec<(&'static str, Stored)> {
    let mut words: Vec<u8> =
        tiny.gate("weight_packed").bytes.iter().cycle().take(33 * 9 * 4).copied().collect();
    words.chunks_exact_mut(9 * 4).for_each(|row| row[34..].fill(0));
    let shape: Vec<u8> = [33_i64, 68].iter().flat_map(|side| side.to_le_bytes()).collect();
    vec![
        ("weight_packed", Stored::new(DType::I32, &[33, 9], words)),
        ("weight_scale", Stored::bf16(&[33])),
        ("weight_shape", Stored::new(DType::I64, &[2], shape)),
    ]
}

fn with_weights(mut group: serde_json::Value, weights: &serde_json::Value) -> serde_json::Value {
    for (key, value) in weights.as_object().unwrap() {
        group["weights"][key] = value.clone();
    }
    group
}

#[test]
fn zero_points_that_a_symmetric_scheme_does_not_use_are_kept_whole() {
    let mut tiny = Tiny::int4(33, 64);
    let zeros = Stored::new(DType::I8, &[33, 2], vec![0; 66]);
    tiny.tensors.insert(format!("{GATE}.weight_zero_point"), zeros);
    let container = assert_lossless(tiny.write().path(), 1);
    assert_eq!(origin(&container, "weight_zero_point"), Origin::Original);
}

#[test]
fn group_indices_come_back_whether_they_order_the_columns_or_not() {
    let indices = |f: &dyn Fn(i32) -> i32| {
        let bytes: Vec<u8> = (0..64).flat_map(|k| f(k).to_le_bytes()).collect();
        Stored::new(DType::I32, &[64], bytes)
    };
    let name = format!("{GATE}.weight_g_idx");
    let mut tiny = Tiny::int4(33, 64);
    let permuted = |container: &Container| {
        let part = container.open_part(ctq_model::inventory::Part::Layer(0)).unwrap();
        part.matrix(GATE).unwrap().permutation.is_some()
    };
    tiny.tensors.insert(name.clone(), indices(&|k| (k * 5 % 64) / 32));
    let shuffled = assert_lossless(tiny.write().path(), 1);
    assert_eq!((origin(&shuffled, "weight_g_idx"), permuted(&shuffled)), (Origin::Tiles, true));
    tiny.tensors.insert(name.clone(), indices(&|k| k / 32));
    let in_order = assert_lossless(tiny.write().path(), 1);
    assert_eq!((origin(&in_order, "weight_g_idx"), permuted(&in_order)), (Origin::Tiles, false));
    tiny.tensors.insert(name, indices(&|_| -1));
    let idle = assert_lossless(tiny.write().path(), 1);
    assert_eq!((origin(&idle, "weight_g_idx"), permuted(&idle)), (Origin::Original, false));
}

#[test]
fn shapes_of_scales_and_stated_shapes_in_other_types_come_back() {
    let mut tiny = Tiny::int4(33, 64);
    let shape: Vec<u8> = [33_i32, 64].iter().flat_map(|side| side.to_le_bytes()).collect();
    *tiny.gate("weight_shape") = Stored::new(DType::I32, &[2], shape);
    let container = assert_lossless(tiny.write().path(), 1);
    assert_eq!(origin(&container, "weight_shape"), Origin::Tiles);
}

#[test]
fn tensors_of_other_modalities_are_left_out_with_their_hash() {
    let mut tiny = Tiny::int4(33, 64);
    tiny.tensors.insert("visual.patch.weight".to_owned(), Stored::bf16(&[3, 3]));
    let container = assert_lossless(tiny.write().path(), 1);
    let [left_out] = &container.manifest().left_out[..] else { panic!("one tensor is left out") };
    assert_eq!((left_out.name.as_str(), &left_out.shape[..]), ("visual.patch.weight", &[3, 3][..]));
}

#[test]
fn the_container_is_counted_with_the_padding_of_its_tiles() {
    let source = Tiny::int4(64, 64).write();
    let out = tempfile::tempdir().unwrap();
    let container = convert_to(source.path(), &out.path().join("out"), &options(1)).unwrap();
    let container_bits = container.manifest().accounting.container.unwrap();
    // Dense bf16 is padded to 64 rows of 64: embedding, head, q, k and v one tile each, o, up and down too; the gate is
    // a tile of nibbles with two bf16 scales a row; three norms of 64.
    let expected = 8 * 64 * 64 * 2 + (64 * 64 / 2 + 64 * 2 * 2) + 3 * 64 * 2;
    assert_eq!(container_bits.bits, expected * 8);
}

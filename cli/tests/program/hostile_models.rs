//! Checkpoints whose files are sound and whose contents are not: tensors that contradict their scheme, values that are
//! no numbers, configurations that ctq does not run. Each refusal names file, tensor or key, and the next step.

use insta::assert_snapshot;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Stored};
use crate::hostile_files::refused;
use crate::session::Session;

const UP: &str = "model.layers.1.mlp.up_proj";

/// What is said to a bundled checkpoint that was changed.
#[track_caller]
fn changed(bundled: &str, change: impl FnOnce(&mut Checkpoint)) -> String {
    let session = Session::with(&[]);
    let mut model = Checkpoint::bundled(bundled);
    change(&mut model);
    model.write(&session, "model");
    refused(&session)
}

/// The same, where only config.json changes.
#[track_caller]
fn configured(key: &str, value: Value) -> String {
    changed("bf16", |model| model.config[key] = value)
}

#[test]
fn missing_tensors() {
    assert_snapshot!(changed("W4A16", |model| {
        model.tensors.remove(&format!("{UP}.weight_scale"));
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_scale` is missing: `weight_packed` needs a scale; download the checkpoint again, or write it again with the quantizer");
    assert_snapshot!(changed("NVFP4", |model| {
        model.tensors.remove(&format!("{UP}.weight_global_scale"));
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_global_scale` is missing: the scheme needs it; download the checkpoint again, or write it again with the quantizer");
    assert_snapshot!(changed("FP8", |model| {
        model.tensors.remove(&format!("{UP}.weight"));
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight` is missing: the module has no weight; download the checkpoint again, or write it again with the quantizer");
    assert_snapshot!(changed("bf16", |model| {
        model.tensors.remove("model.norm.weight");
    }), @"error: model: tensor `model.norm.weight` is missing: every norm of this architecture has a weight; download the checkpoint again, or write it again with the quantizer");
    assert_snapshot!(changed("FP8", |model| {
        model.tensors.remove(&format!("{UP}.input_scale"));
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.input_scale` is missing: the scheme's activations are static; download the checkpoint again, or write it again with the quantizer");
}

#[test]
fn wrong_dtypes() {
    assert_snapshot!(changed("W4A16", |model| {
        let packed = model.tensor(&format!("{UP}.weight_packed"));
        *packed = Stored { dtype: Dtype::F32, ..packed.clone() };
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_packed`: dtype F32 with scales of dtype BF16 is no compressed-tensors format ctq knows; write the checkpoint again with compressed-tensors, or report this if the library accepts it");
    assert_snapshot!(changed("NVFP4", |model| {
        let scale = model.tensor(&format!("{UP}.weight_scale"));
        *scale = Stored { dtype: Dtype::I8, ..scale.clone() };
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_packed`: dtype U8 with scales of dtype I8 is no compressed-tensors format ctq knows; write the checkpoint again with compressed-tensors, or report this if the library accepts it");
    assert_snapshot!(changed("bf16", |model| {
        let weight = model.tensor(&format!("{UP}.weight"));
        *weight = Stored { dtype: Dtype::U16, ..weight.clone() };
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight`: dtype U16; dense weights are BF16, F16 or F32; write the checkpoint again with compressed-tensors, or report this if the library accepts it");
}

#[test]
fn wrong_shapes() {
    assert_snapshot!(changed("bf16", |model| {
        model.tensor(&format!("{UP}.weight")).shape.reverse();
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight`: shape [128, 256] where [256, 128] is expected for a linear of 256 outputs and 128 inputs; write the checkpoint again with compressed-tensors, or report this if the library accepts it");
    assert_snapshot!(changed("W4A16", |model| {
        let scale = model.tensor(&format!("{UP}.weight_scale"));
        scale.shape[0] /= 2;
        scale.bytes.truncate(scale.bytes.len() / 2);
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_scale`: shape [128, 1] holds 128 values where 256 are expected for 256 outputs and 128 inputs; write the checkpoint again with compressed-tensors, or report this if the library accepts it");
    assert_snapshot!(changed("NVFP4", |model| {
        let packed = model.tensor(&format!("{UP}.weight_packed"));
        packed.shape = vec![packed.bytes.len()];
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_packed`: shape [16384] where [256, 64] is expected for a linear of 256 outputs and 128 inputs; write the checkpoint again with compressed-tensors, or report this if the library accepts it");
}

#[test]
fn tensors_of_the_decoder_that_nothing_asks_for_are_said() {
    let session = Session::with(&[]);
    let mut model = Checkpoint::bundled("bf16");
    model.config["num_hidden_layers"] = json!(1);
    model.write(&session, "model");
    assert_snapshot!(session.ctq("convert model out").expect(0).stderr, @"
    warning: model: 9 tensors of the decoder are not used, such as `model.layers.1.input_layernorm.weight`: config.json asks for 1 layers without them; compare it with that of the original model
    tensors that are not part of the text model, left out: 9; their hashes are in ctq.json
    ");
    let line = "-q eval out --data text.txt --ctx 64 --rows 1";
    assert_snapshot!(session.ctq(line).expect(0).stderr, @"warning: out: 9 tensors of the decoder are not used, such as `model.layers.1.input_layernorm.weight`: config.json asks for 1 layers without them; compare it with that of the original model");
}

#[test]
fn scales_that_are_no_numbers() {
    let scale = |bundled: &str, leaf: &str, at: usize, bytes: &[u8]| {
        changed(bundled, |model| {
            model.tensor(&format!("{UP}.{leaf}")).bytes[at..at + bytes.len()].copy_from_slice(bytes);
        })
    };
    assert_snapshot!(scale("W4A16", "weight_scale", 10, &0x7fc0_u16.to_le_bytes()), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_scale`: row 5, column 0: the scale is NaN; download the checkpoint again, or quantize the model again");
    assert_snapshot!(scale("W4A16", "weight_scale", 10, &0x7f80_u16.to_le_bytes()), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_scale`: row 5, column 0: the scale is infinite; download the checkpoint again, or quantize the model again");
    assert_snapshot!(scale("NVFP4", "weight_scale", 10, &[0x7f]), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_scale`: row 1, column 2: the scale is NaN; download the checkpoint again, or quantize the model again");
    assert_snapshot!(scale("NVFP4", "weight_global_scale", 0, &f32::INFINITY.to_le_bytes()), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_global_scale`: is infinite, and every scale is divided by it; download the checkpoint again, or quantize the model again");
    assert_snapshot!(scale("FP8", "weight_scale", 0, &0x7fc0_u16.to_le_bytes()), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_scale`: row 0, column 0: the scale is NaN; download the checkpoint again, or quantize the model again");
    assert_snapshot!(scale("FP8", "input_scale", 0, &0x7f80_u16.to_le_bytes()), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.input_scale`: element 0 is infinite; download the checkpoint again, or quantize the model again");
}

#[test]
fn weights_that_are_no_numbers() {
    assert_snapshot!(changed("bf16", |model| {
        model.tensor(&format!("{UP}.weight")).bytes[300..302].copy_from_slice(&0xff80_u16.to_le_bytes());
    }), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight`: row 1, column 22: the weight is infinite; download the checkpoint again, or quantize the model again");
    assert_snapshot!(changed("FP8", |model| model.tensor(&format!("{UP}.weight")).bytes[300] = 0x7f), @"error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight`: row 2, column 44: the weight is NaN; download the checkpoint again, or quantize the model again");
    assert_snapshot!(changed("bf16", |model| {
        model.tensor("model.norm.weight").bytes[4..6].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    }), @"error: model/model.safetensors: tensor `model.norm.weight`: element 2 is NaN; download the checkpoint again, or quantize the model again");
}

#[test]
fn unknown_formats() {
    let quantization = |pointer: &str, value: Value| {
        changed("W4A16", |model| {
            *model.config.pointer_mut(pointer).expect("a key of the bundled config") = value;
        })
    };
    assert_snapshot!(quantization("/quantization_config/quant_method", json!("gptq")), @"error: model/config.json: not supported: `quantization_config.quant_method` = `gptq`; ctq reads compressed-tensors checkpoints; convert with llm-compressor first");
    assert_snapshot!(quantization("/quantization_config/format", json!("marlin-24")), @"error: model/config.json: not supported: `quantization_config.format` = `marlin-24`; ctq reads dense, pack-quantized, int-quantized, float-quantized, naive-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized, mxfp6-pack-quantized, mxfp8-quantized, mixed-precision; save the checkpoint in one of these");
    let group = "/quantization_config/config_groups/group_0";
    assert_snapshot!(quantization(&format!("{group}/format"), json!("fancy-quantized")), @"error: model/config.json: not supported: `quantization_config.config_groups.group_0.format` = `fancy-quantized`; ctq reads dense, pack-quantized, int-quantized, float-quantized, naive-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized, mxfp6-pack-quantized, mxfp8-quantized, mixed-precision; save the checkpoint in one of these");
    assert_snapshot!(quantization(&format!("{group}/weights/num_bits"), json!(11)), @"error: model/config.json: `quantization_config.config_groups.group_0.weights.num_bits`: expected 2 to 8 for int, 4, 6 or 8 for float, found 11; correct the file or download it again");
    assert_snapshot!(quantization(&format!("{group}/weights/type"), json!("ternary")), @r#"error: model/config.json: `quantization_config.config_groups.group_0.weights.type`: expected int or float, found "ternary"; correct the file or download it again"#);
    assert_snapshot!(quantization(&format!("{group}/weights/strategy"), json!("spiral")), @r#"error: model/config.json: `quantization_config.config_groups.group_0.weights.strategy`: expected tensor, channel, group, tensor_group, block, token or attn_head, found "spiral"; correct the file or download it again"#);
    assert_snapshot!(quantization(&format!("{group}/targets"), json!(["re:("])), @"error: model/config.json: `quantization_config`: `re:(` is not a regular expression (Parsing error at position 6: Opening parenthesis without closing parenthesis); correct the target or ignore entry");
    assert_snapshot!(changed("W4A16", |model| {
        model.config["quantization_config"]["sparsity_config"] = json!({ "format": "sparse-24-bitmask" });
    }), @"error: model/config.json: not supported: `quantization_config.sparsity_config.format` = `sparse-24-bitmask`: compressed sparse storage; decompress the checkpoint with compressed-tensors before 0.13 and save it again");
    assert_snapshot!(changed("W4A16", |model| {
        model.config["quantization_config"]["transform_config"] = json!({
            "config_groups": { "online": { "type": "hadamard", "apply": [{ "targets": ["Linear"], "location": "input" }] } }
        });
    }), @"error: model/config.json: not supported: `quantization_config.transform_config.online` transforms at run time (`input`); only transforms fused into the weights are supported; quantize without the online ones");
}

#[test]
fn a_quantized_checkpoint_without_its_configuration() {
    assert_snapshot!(changed("W4A16", |model| {
        model.config.as_object_mut().expect("an object").remove("quantization_config");
    }), @"error: model/model.safetensors: tensor `model.layers.0.self_attn.q_proj.weight_packed`: is quantized, but no group of quantization_config applies to this module (it is ignored or matched by no target); write the checkpoint again with compressed-tensors, or report this if the library accepts it");
}

#[test]
fn unknown_architectures() {
    assert_snapshot!(configured("model_type", json!("mamba")), @"error: model/config.json: not supported: architecture `mamba`; ctq runs llama, mistral, qwen2, qwen3, mixtral, qwen3_moe; see ARCHITECTURE.md for adding a family");
    assert_snapshot!(changed("bf16", |model| {
        model.config.as_object_mut().expect("an object").remove("model_type");
    }), @"error: model/config.json: `model_type`: required and missing; restore the config.json of the original model");
}

#[test]
fn keys_that_change_numbers_and_are_not_supported() {
    let told = [
        configured("attn_logit_softcapping", json!(30.0)),
        configured("hidden_act", json!("gelu")),
        configured("partial_rotary_factor", json!(0.5)),
        configured(
            "rope_parameters",
            json!({ "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0 }),
        ),
        configured("rope_scaling", json!({ "rope_type": "linear", "factor": 2.0 })),
        configured("clip_qkv", json!(8.0)),
    ];
    assert_snapshot!(told.concat(), @"
    error: model/config.json: `attn_logit_softcapping`: is set to 30.0, and ctq does not know what it means for a `llama` model; it could change the numbers; if it cannot, run again with --accept-config-key attn_logit_softcapping
    error: model/config.json: not supported: `hidden_act` = `gelu`; the supported families use silu
    error: model/config.json: `partial_rotary_factor`: is set to 0.5, and ctq does not know what it means for a `llama` model; it could change the numbers; if it cannot, run again with --accept-config-key partial_rotary_factor
    error: model/config.json: not supported: `rope_parameters.rope_type` = `dynamic`; implemented are default, linear, llama3 and yarn
    error: model/config.json: `rope_scaling`: differs from `rope_parameters`, which says the same thing in the newer spelling; remove one of them, or restore the config.json of the original model
    error: model/config.json: `clip_qkv`: is set to 8.0, and ctq does not know what it means for a `llama` model; it could change the numbers; if it cannot, run again with --accept-config-key clip_qkv
    ");
}

#[test]
fn a_key_that_ctq_does_not_know_can_be_accepted() {
    let told = configured("frobnication_rate", json!(0.5));
    assert_snapshot!(told, @"error: model/config.json: `frobnication_rate`: is set to 0.5, and ctq does not know what it means for a `llama` model; it could change the numbers; if it cannot, run again with --accept-config-key frobnication_rate");
    let session = Session::with(&[]);
    let mut model = Checkpoint::bundled("bf16");
    model.config["frobnication_rate"] = json!(0.5);
    model.write(&session, "model");
    session.ctq("convert model out --accept-config-key frobnication_rate").expect(0);
    session
        .ctq("eval model --data text.txt --ctx 64 --rows 1 --accept-config-key frobnication_rate")
        .expect(0);
}

#[test]
fn impossible_configurations() {
    let told = [
        configured("hidden_size", json!(127)),
        configured("num_hidden_layers", json!(0)),
        configured("num_hidden_layers", json!(3)),
        configured("num_attention_heads", json!("four")),
        configured("num_key_value_heads", json!(3)),
        configured("vocab_size", json!(481)),
        configured("rms_norm_eps", json!(-1.0)),
        configured("head_dim", json!(-1)),
        configured("hidden_size", json!(u64::MAX)),
    ];
    assert_snapshot!(told.concat(), @r#"
    error: model/model.safetensors: tensor `model.embed_tokens.weight`: shape [480, 128] where [480, 127] is expected for a linear of 480 outputs and 127 inputs; write the checkpoint again with compressed-tensors, or report this if the library accepts it
    error: model/config.json: `num_hidden_layers`: expected a positive integer, found 0; correct the file or download it again
    error: model: tensor `model.layers.2.input_layernorm.weight` is missing: every norm of this architecture has a weight; download the checkpoint again, or write it again with the quantizer
    error: model/config.json: `num_attention_heads`: expected a non-negative integer, found "four"; correct the file or download it again
    error: model/config.json: `num_key_value_heads`: 3 does not divide the 4 attention heads; restore the config.json of the original model
    error: model/model.safetensors: tensor `model.embed_tokens.weight`: shape [480, 128] where [481, 128] is expected for a linear of 481 outputs and 128 inputs; write the checkpoint again with compressed-tensors, or report this if the library accepts it
    error: model/config.json: `rms_norm_eps`: expected a number that is not negative, found -1.0; correct the file or download it again
    error: model/config.json: `head_dim`: expected a non-negative integer, found -1; correct the file or download it again
    error: model/config.json: `hidden_size`: expected a non-negative integer, found 18446744073709551615; correct the file or download it again
    "#);
}

//! Groups written as a preset's name with its targets, `{"W4A16": ["Linear"]}`, spelled out.

use crate::quantization::{ActOrder, Dynamic, ElementType, Group, QuantizationArgs, ScaleDtype, Strategy};

/// Presets of compressed-tensors (`quant_scheme.py`, `PRESET_SCHEMES`).
pub(crate) fn preset(name: &str, targets: Vec<String>) -> Option<Group> {
    let arguments = |element, num_bits, strategy, dynamic, symmetric, scale_dtype| QuantizationArgs {
        element,
        num_bits,
        symmetric,
        strategy,
        dynamic,
        act_order: ActOrder::Storage,
        scale_dtype,
    };
    use Dynamic::{Dynamic as D, Local, Static as S};
    use ElementType::{Float, Int};
    let group = |size| Strategy::Group { size };
    let int_weight = |bits| arguments(Int, bits, group(128), S, true, None);
    let fp8 = |strategy, dynamic| arguments(Float, 8, strategy, dynamic, true, None);
    let mx = |bits, dynamic| arguments(Float, bits, group(32), dynamic, true, Some(ScaleDtype::E8m0));
    let nvfp4 = |dynamic| {
        arguments(Float, 4, Strategy::TensorGroup { size: 16 }, dynamic, true, Some(ScaleDtype::E4m3))
    };
    let int8_token = || arguments(Int, 8, Strategy::Token, D, true, None);
    let (weights, input) = match name.to_ascii_uppercase().as_str() {
        "UNQUANTIZED" => (None, None),
        "W4A16" => (Some(int_weight(4)), None),
        "W8A16" => (Some(int_weight(8)), None),
        "W4A16_ASYM" => (Some(arguments(Int, 4, group(128), S, false, None)), None),
        "W8A8" | "INT8" => (Some(arguments(Int, 8, Strategy::Channel, S, true, None)), Some(int8_token())),
        "W4A8" => (Some(int_weight(4)), Some(int8_token())),
        "W4AFP8" => (Some(int_weight(4)), Some(fp8(Strategy::Token, D))),
        "FP8" => (Some(fp8(Strategy::Tensor, S)), Some(fp8(Strategy::Tensor, S))),
        "FP8_DYNAMIC" => (Some(fp8(Strategy::Channel, S)), Some(fp8(Strategy::Token, D))),
        "FP8_BLOCK" => (Some(fp8(Strategy::Block { rows: 128, columns: 128 }, S)), Some(fp8(group(128), D))),
        "NVFP4A16" => (Some(nvfp4(S)), None),
        "NVFP4" => (Some(nvfp4(S)), Some(nvfp4(Local))),
        "MXFP4A16" => (Some(mx(4, S)), None),
        "MXFP4" => (Some(mx(4, S)), Some(mx(4, D))),
        "MXFP8A16" => (Some(mx(8, S)), None),
        "MXFP8" => (Some(mx(8, S)), Some(mx(8, D))),
        _ => return None,
    };
    Some(Group {
        name: name.to_owned(),
        targets,
        format: None,
        weights,
        input_activations: input,
        output_activations: None,
    })
}

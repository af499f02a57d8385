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
    let int_token = |bits| arguments(Int, bits, Strategy::Token, D, true, None);
    let (weights, input) = match name.to_ascii_uppercase().as_str() {
        "UNQUANTIZED" => (None, None),
        "W4A16_ASYM" => (Some(arguments(Int, 4, group(128), S, false, None)), None),
        "W8A8" | "INT8" => (Some(arguments(Int, 8, Strategy::Channel, S, true, None)), Some(int_token(8))),
        "W4AFP8" => (Some(int_weight(4)), Some(fp8(Strategy::Token, D))),
        "FP8" => (Some(fp8(Strategy::Tensor, S)), Some(fp8(Strategy::Tensor, S))),
        "FP8_DYNAMIC" => (Some(fp8(Strategy::Channel, S)), Some(fp8(Strategy::Token, D))),
        "FP8_BLOCK" => (Some(fp8(Strategy::Block { rows: 128, columns: 128 }, S)), Some(fp8(group(128), D))),
        "NVFP4A16" => (Some(nvfp4(S)), None),
        "NVFP4" => (Some(nvfp4(S)), Some(nvfp4(Local))),
        "MXFP4A16" => (Some(mx(4, S)), None),
        "MXFP4" => (Some(mx(4, S)), Some(mx(4, D))),
        "MXFP4XFP8" => (Some(mx(4, S)), Some(fp8(group(128), D))),
        "MXFP8A16" => (Some(mx(8, S)), None),
        "MXFP8" => (Some(mx(8, S)), Some(mx(8, D))),
        other => {
            let (weight_bits, input_bits) = integer_bits(other)?;
            (Some(int_weight(weight_bits)), (input_bits < 16).then(|| int_token(input_bits)))
        }
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

/// The bits of `W3A16`, `W4A8` and their like: 2 to 8 for weights, in groups; 16 (none), 8 or 4 for inputs.
fn integer_bits(name: &str) -> Option<(u8, u8)> {
    let (weights, inputs) = name.strip_prefix('W')?.split_once('A')?;
    let (weights, inputs) = (weights.parse().ok()?, inputs.parse().ok()?);
    let known = matches!((weights, inputs), (2..=8, 16) | (2..=7, 8) | (2..=4, 4));
    known.then_some((weights, inputs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integer_presets_of_every_width() {
        let known = |name: &str| {
            let group = preset(name, vec!["Linear".to_owned()])?;
            Some((group.weights?.num_bits, group.input_activations.map(|input| input.num_bits)))
        };
        assert_eq!(known("W3A16"), Some((3, None)));
        assert_eq!(known("w6a8"), Some((6, Some(8))));
        assert_eq!(known("W4A4"), Some((4, Some(4))));
        assert_eq!(known("W8A8"), Some((8, Some(8))));
        for unknown in ["W8A4", "W1A16", "W9A16", "W4A", "WA16", "W4A6"] {
            assert_eq!(known(unknown), None, "{unknown}");
        }
    }
}

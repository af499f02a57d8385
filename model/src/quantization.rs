//! `quantization_config` as read: groups, their arguments, the ignore list and the kv-cache scheme.
//!
//! Field by field after compressed-tensors' `QuantizationConfig`, `QuantizationScheme` and `QuantizationArgs`;
//! unknown keys are tolerated at the top level (the library does so) and refused inside arguments (so does it).

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::ModelConfig;
use crate::json::Object;
use crate::presets;
use crate::{Error, Result};

/// The whole section.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizationConfig {
    /// Global storage format, e.g. `pack-quantized`; `mixed-precision` when groups differ.
    pub format: Option<String>,
    /// Schemes and what they apply to, in file order.
    pub groups: Vec<Group>,
    /// Modules that stay unquantized: names, class names or `re:` patterns.
    pub ignore: Vec<String>,
    /// Quantization of keys and values, where configured for the whole model.
    pub kv_cache: Option<QuantizationArgs>,
    /// Version of the library that wrote the file.
    pub version: Option<String>,
}

/// One scheme and its targets.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Name in `config_groups`.
    pub name: String,
    /// Module names, class names or `re:` patterns.
    pub targets: Vec<String>,
    /// Storage format of this group, where it differs from the global one.
    pub format: Option<String>,
    /// Weights; `None` leaves them unquantized.
    pub weights: Option<QuantizationArgs>,
    /// Inputs of the modules.
    pub input_activations: Option<QuantizationArgs>,
    /// Outputs of the modules.
    pub output_activations: Option<QuantizationArgs>,
}

/// How one tensor is quantized.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuantizationArgs {
    /// Integers or floats.
    pub element: ElementType,
    /// Bits of one code.
    pub num_bits: u8,
    /// Whether codes are centred on zero without a zero point.
    pub symmetric: bool,
    /// Which elements share a scale.
    pub strategy: Strategy,
    /// Whether scales are found at run time.
    pub dynamic: Dynamic,
    /// Columns permuted by importance before grouping.
    pub act_order: ActOrder,
    /// Type that scales are rounded to, where stated.
    pub scale_dtype: Option<ScaleDtype>,
}

/// `type` of the arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ElementType {
    /// Two's complement integers.
    Int,
    /// 4 bits: E2M1; 6 bits: E2M3; 8 bits: E4M3 (fn).
    Float,
}

/// Which elements share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Strategy {
    /// All of them.
    Tensor,
    /// One row of a weight.
    Channel,
    /// `size` consecutive elements along k.
    Group {
        /// Elements that share a scale.
        size: usize,
    },
    /// As `Group`, with a second, global scale for the whole tensor.
    TensorGroup {
        /// Elements that share a scale.
        size: usize,
    },
    /// A rectangle of a weight.
    Block {
        /// Rows of the rectangle.
        rows: usize,
        /// Columns of the rectangle.
        columns: usize,
    },
    /// One token of an activation.
    Token,
    /// One head of keys, values or queries.
    AttentionHead,
}

/// Whether scales are found at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dynamic {
    /// Stored.
    Static,
    /// Found from the data.
    Dynamic,
    /// Group scales found from the data under a stored global scale.
    Local,
}

/// `actorder`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActOrder {
    /// None, or `weight`/`static`: storage is as usual.
    Storage,
    /// `group`/`dynamic`: `weight_g_idx` says the group of each column.
    Group,
}

/// Type that scales are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleDtype {
    /// E4M3 (fn).
    E4m3,
    /// A power of two, stored as its exponent.
    E8m0,
    /// The model's own float types: no further rounding.
    Float,
}

impl QuantizationConfig {
    /// Reads the section; `None` for a dense checkpoint.
    ///
    /// # Errors
    /// Names the key that is malformed or asks for something ctq does not run.
    pub fn read(config: &ModelConfig) -> Result<Option<QuantizationConfig>> {
        let Some((key, map)) = config.quantization()? else { return Ok(None) };
        let section = Object { file: config.path(), prefix: key, map };
        if let Some(method) = section.string("quant_method")?
            && method != "compressed-tensors"
        {
            return Err(Error::unsupported(
                config.path(),
                format!("`{key}.quant_method` = `{method}`"),
                "ctq reads compressed-tensors checkpoints; convert with llm-compressor first",
            ));
        }
        refuse_sparsity(section)?;
        refuse_online_transforms(section)?;
        let mut groups = Vec::new();
        if let Some(groups_map) = section.object("config_groups")? {
            for (name, value) in groups_map {
                groups.push(group(config.path(), &format!("{key}.config_groups.{name}"), name, value)?);
            }
        }
        let kv_cache = match section.object("kv_cache_scheme")? {
            Some(map) => {
                Some(args(Object { file: config.path(), prefix: &section.dotted("kv_cache_scheme"), map })?)
            }
            None => None,
        };
        Ok(Some(QuantizationConfig {
            format: format(section)?,
            groups,
            ignore: section.strings("ignore")?,
            kv_cache,
            version: section.string("version")?.map(str::to_owned),
        }))
    }
}

/// Formats of `CompressionFormat` whose tensors ctq reads. The tensors say more than the name does, but a name from
/// outside this list may stand for another meaning of the same tensors.
const FORMATS: &[&str] = &[
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
];

fn format(object: Object<'_>) -> Result<Option<String>> {
    match object.string("format")? {
        Some(format) if !FORMATS.contains(&format) => Err(Error::unsupported(
            object.file,
            format!("`{}` = `{format}`", object.dotted("format")),
            format!("ctq reads {}; save the checkpoint in one of these", FORMATS.join(", ")),
        )),
        format => Ok(format.map(str::to_owned)),
    }
}

fn refuse_sparsity(section: Object<'_>) -> Result<()> {
    let Some(map) = section.object("sparsity_config")? else { return Ok(()) };
    let prefix = section.dotted("sparsity_config");
    let sparsity = Object { file: section.file, prefix: &prefix, map };
    match sparsity.string("format")? {
        None | Some("dense") => Ok(()),
        Some(format) => Err(Error::unsupported(
            section.file,
            format!("`{prefix}.format` = `{format}`: compressed sparse storage"),
            "decompress the checkpoint with compressed-tensors before 0.13 and save it again",
        )),
    }
}

/// Offline transforms are already inside the stored weights; online ones would have to run between the matmuls.
fn refuse_online_transforms(section: Object<'_>) -> Result<()> {
    let Some(map) = section.object("transform_config")? else { return Ok(()) };
    let Some(groups) = map.get("config_groups").and_then(Value::as_object) else { return Ok(()) };
    for (name, group) in groups {
        for apply in group.get("apply").and_then(Value::as_array).into_iter().flatten() {
            let location = apply.get("location").and_then(Value::as_str).unwrap_or("");
            if !matches!(location, "weight_input" | "weight_output") {
                return Err(Error::unsupported(
                    section.file,
                    format!(
                        "`{}.{name}` transforms at run time (`{location}`)",
                        section.dotted("transform_config")
                    ),
                    "only transforms fused into the weights are supported; quantize without the online ones",
                ));
            }
        }
    }
    Ok(())
}

fn group(file: &Path, prefix: &str, name: &str, value: &Value) -> Result<Group> {
    // A list is a preset's name with its targets: {"W4A16": ["Linear"]}.
    if let Value::Array(_) = value {
        let wrapper: Map<String, Value> = [("targets".to_owned(), value.clone())].into_iter().collect();
        let targets = Object { file, prefix, map: &wrapper }.strings("targets")?;
        return presets::preset(name, targets).ok_or_else(|| {
            Error::config(
                file,
                prefix,
                "not a preset of compressed-tensors that ctq knows",
                "write the group out",
            )
        });
    }
    let map = value.as_object().ok_or_else(|| {
        Error::config(file, prefix, "expected an object", "correct the file or download it again")
    })?;
    let object = Object { file, prefix, map };
    let nested = |key: &str| -> Result<Option<QuantizationArgs>> {
        let Some(map) = object.object(key)? else { return Ok(None) };
        args(Object { file, prefix: &object.dotted(key), map }).map(Some)
    };
    Ok(Group {
        name: name.to_owned(),
        targets: object.strings("targets")?,
        format: format(object)?,
        weights: nested("weights")?,
        input_activations: nested("input_activations")?,
        output_activations: nested("output_activations")?,
    })
}

const ARGUMENT_KEYS: &[&str] = &[
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
];

fn args(object: Object<'_>) -> Result<QuantizationArgs> {
    for (key, value) in object.map {
        if !value.is_null() && !ARGUMENT_KEYS.contains(&key.as_str()) {
            return Err(Error::config(
                object.file,
                &object.dotted(key),
                "not an argument that compressed-tensors knows; it could change the numbers",
                "remove it, or write the checkpoint with compressed-tensors",
            ));
        }
    }
    let element = match object.string("type")?.map(str::to_ascii_lowercase).as_deref() {
        None | Some("int") => ElementType::Int,
        Some("float") => ElementType::Float,
        Some(other) => return Err(object.wrong("type", "int or float", &other.into())),
    };
    let num_bits = object.positive("num_bits")?.unwrap_or(8);
    let valid = match element {
        ElementType::Int => (2..=8).contains(&num_bits),
        ElementType::Float => matches!(num_bits, 4 | 6 | 8),
    };
    if !valid {
        return Err(object.wrong("num_bits", "2 to 8 for int, 4, 6 or 8 for float", &num_bits.into()));
    }
    Ok(QuantizationArgs {
        element,
        num_bits: num_bits as u8,
        symmetric: object.boolean("symmetric")?.unwrap_or(true),
        strategy: strategy(object)?,
        dynamic: dynamic(object)?,
        act_order: act_order(object)?,
        scale_dtype: scale_dtype(object)?,
    })
}

fn strategy(object: Object<'_>) -> Result<Strategy> {
    let group_size = match object.get("group_size") {
        None => None,
        Some(value) => Some(value.as_i64().ok_or_else(|| object.wrong("group_size", "an integer", value))?),
    };
    let size = || match group_size {
        Some(size) if size > 0 => Ok(size as usize),
        _ => Err(object.absent("group_size")),
    };
    match object.string("strategy")?.map(str::to_ascii_lowercase).as_deref() {
        Some("tensor") => Ok(Strategy::Tensor),
        Some("channel") => Ok(Strategy::Channel),
        Some("group") => Ok(Strategy::Group { size: size()? }),
        Some("tensor_group") => Ok(Strategy::TensorGroup { size: size()? }),
        Some("block") => block(object),
        Some("token") => Ok(Strategy::Token),
        Some("attn_head") => Ok(Strategy::AttentionHead),
        Some(other) => Err(object.wrong(
            "strategy",
            "tensor, channel, group, tensor_group, block, token or attn_head",
            &other.into(),
        )),
        None => match group_size {
            None => Ok(Strategy::Tensor),
            Some(-1) => Ok(Strategy::Channel),
            Some(_) => Ok(Strategy::Group { size: size()? }),
        },
    }
}

fn block(object: Object<'_>) -> Result<Strategy> {
    let wrong = |value: &Value| object.wrong("block_structure", "[rows, columns]", value);
    let value = object.get("block_structure").ok_or_else(|| object.absent("block_structure"))?;
    // 2024 files write "128x128".
    let sides: Vec<usize> = match value {
        Value::String(text) => text.split('x').filter_map(|side| side.trim().parse().ok()).collect(),
        Value::Array(sides) => sides.iter().filter_map(|side| side.as_u64().map(|n| n as usize)).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => Vec::new(),
    };
    match sides[..] {
        [rows, columns] if rows > 0 && columns > 0 => Ok(Strategy::Block { rows, columns }),
        _ => Err(wrong(value)),
    }
}

fn dynamic(object: Object<'_>) -> Result<Dynamic> {
    match object.get("dynamic") {
        None | Some(Value::Bool(false)) => Ok(Dynamic::Static),
        Some(Value::Bool(true)) => Ok(Dynamic::Dynamic),
        Some(Value::String(text)) if text == "local" => Ok(Dynamic::Local),
        Some(other) => Err(object.wrong("dynamic", "true, false or \"local\"", other)),
    }
}

fn act_order(object: Object<'_>) -> Result<ActOrder> {
    match object.get("actorder") {
        None | Some(Value::Bool(false)) => Ok(ActOrder::Storage),
        Some(Value::Bool(true)) => Ok(ActOrder::Group),
        Some(Value::String(text)) => match text.to_ascii_lowercase().as_str() {
            "weight" | "static" => Ok(ActOrder::Storage),
            "group" | "dynamic" => Ok(ActOrder::Group),
            other => Err(object.wrong("actorder", "weight, static, group or dynamic", &other.into())),
        },
        Some(other) => Err(object.wrong("actorder", "weight, static, group or dynamic", other)),
    }
}

fn scale_dtype(object: Object<'_>) -> Result<Option<ScaleDtype>> {
    let Some(text) = object.string("scale_dtype")? else { return Ok(None) };
    Ok(Some(match text.trim_start_matches("torch.") {
        "float8_e4m3fn" => ScaleDtype::E4m3,
        "uint8" | "float8_e8m0fnu" => ScaleDtype::E8m0,
        "bfloat16" | "float16" | "float32" => ScaleDtype::Float,
        other => {
            return Err(object.wrong(
                "scale_dtype",
                "torch.float8_e4m3fn, torch.uint8 or a float type",
                &other.into(),
            ));
        }
    }))
}

//! The scheme of a module: what the configuration says of it, confirmed by the tensors that are really there.
//!
//! Where the two disagree about storage, the tensors win; where they contradict each other in shape or dtype,
//! reading fails.

use crate::matrix::{Code, Sharing};
use crate::quantization::{ActOrder, Dynamic, ElementType, Group, QuantizationArgs, ScaleDtype, Strategy};
use crate::scheme::{
    Activation, ActivationScale, ActivationSharing, Scheme, Storage, WordLayout, ZeroStorage,
};
use crate::{DType, Error, Result, TensorSource};

/// What a module's tensors are called.
const LEAVES: &[&str] = &[
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    "weight_global_scale",
    "bias",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
];

/// Tensor names of a module, in a fixed order, as far as the source has them.
pub(crate) fn tensors_of(source: &dyn TensorSource, module: &str) -> Vec<String> {
    LEAVES.iter().map(|leaf| format!("{module}.{leaf}")).filter(|name| source.info(name).is_some()).collect()
}

/// Reads the scheme of the `n` x `k` linear `module`.
///
/// `group` is what the configuration says of it, `None` where it is ignored or matched by nothing.
pub(crate) fn resolve(
    source: &dyn TensorSource,
    module: &str,
    (n, k): (usize, usize),
    group: Option<&Group>,
) -> Result<Scheme> {
    Resolver { source, module, n, k, group }.scheme()
}

struct Resolver<'a> {
    source: &'a dyn TensorSource,
    module: &'a str,
    n: usize,
    k: usize,
    group: Option<&'a Group>,
}

const REWRITE: &str =
    "write the checkpoint again with compressed-tensors, or report this if the library accepts it";

impl Resolver<'_> {
    fn name(&self, leaf: &str) -> String {
        format!("{}.{leaf}", self.module)
    }

    fn dtype(&self, leaf: &str) -> Option<DType> {
        self.source.info(&self.name(leaf)).map(|info| info.dtype)
    }

    fn bad(&self, leaf: &str, what: impl Into<String>) -> Error {
        let name = self.name(leaf);
        Error::tensor(self.source.file_of(&name), &name, what, REWRITE)
    }

    fn missing(&self, leaf: &str, what: impl Into<String>) -> Error {
        let any = tensors_of(self.source, self.module);
        let file = any.first().map_or(self.source.root(), |name| self.source.file_of(name));
        Error::missing(file, &self.name(leaf), what)
    }

    fn expect_shape(&self, leaf: &str, expected: &[usize]) -> Result<()> {
        let info =
            self.source.info(&self.name(leaf)).ok_or_else(|| self.missing(leaf, "its module needs it"))?;
        if info.shape == expected {
            return Ok(());
        }
        Err(self.bad(
            leaf,
            format!(
                "shape {:?} where {expected:?} is expected for a linear of {} outputs and {} inputs",
                info.shape, self.n, self.k
            ),
        ))
    }

    fn scheme(&self) -> Result<Scheme> {
        if self.dtype("bias").is_some() {
            self.expect_shape("bias", &[self.n])?;
        }
        let weights = self.group.and_then(|group| group.weights.as_ref());
        match (self.dtype("weight_packed"), self.dtype("weight"), self.dtype("weight_scale")) {
            (Some(packed), None, scale) => self.packed("weight_packed", packed, scale, weights),
            // Files of early 2024 call the packed words `weight`.
            (None, Some(DType::I32), scale) => self.packed("weight", DType::I32, scale, weights),
            (None, Some(weight), Some(scale)) => self.plain(weight, scale, weights),
            (None, Some(weight), None) => self.dense(weight, weights),
            (Some(_), Some(_), _) => {
                Err(self.bad("weight", "stored beside `weight_packed`: one of the two is wrong"))
            }
            (None, None, _) => Err(self.missing("weight", "the module has no weight")),
        }
    }

    fn args<'a>(&self, weights: Option<&'a QuantizationArgs>, leaf: &str) -> Result<&'a QuantizationArgs> {
        weights.ok_or_else(|| {
            self.bad(
                leaf,
                "is quantized, but no group of quantization_config applies to this module (it is ignored or matched by no target)",
            )
        })
    }

    fn dense(&self, dtype: DType, weights: Option<&QuantizationArgs>) -> Result<Scheme> {
        if matches!(dtype, DType::I8 | DType::F8E4M3 | DType::U8 | DType::F8E5M2) {
            return Err(self.missing("weight_scale", format!("`weight` is {dtype}, which needs a scale")));
        }
        if !dtype.is_dense_float() {
            return Err(self.bad("weight", format!("dtype {dtype}; dense weights are BF16, F16 or F32")));
        }
        if weights.is_some() {
            let name = &self.group.map_or("", |group| group.name.as_str());
            return Err(self.missing(
                "weight_scale",
                format!("quantization_config group `{name}` applies to this module, and its weight is not quantized"),
            ));
        }
        self.expect_shape("weight", &[self.n, self.k])?;
        // A group may quantize activations only.
        let (input, output) = self.activations()?;
        Ok(Scheme {
            storage: Storage::Dense { dtype },
            sharing: Sharing::Tensor,
            scale_dtype: None,
            zeros: ZeroStorage::None,
            act_order: false,
            input,
            output,
        })
    }

    fn packed(
        &self,
        leaf: &str,
        packed: DType,
        scale: Option<DType>,
        weights: Option<&QuantizationArgs>,
    ) -> Result<Scheme> {
        let scale = scale.ok_or_else(|| self.missing("weight_scale", format!("`{leaf}` needs a scale")))?;
        let args = self.args(weights, leaf)?;
        match (packed, scale) {
            (DType::I32, _) => self.packed_int(leaf, scale, args),
            (DType::U8, DType::F8E4M3) => {
                if !self.k.is_multiple_of(16) {
                    return Err(self.bad(leaf, format!("{} inputs are not a multiple of 16", self.k)));
                }
                self.expect_shape(leaf, &[self.n, self.k / 2])?;
                self.expect_shape("weight_scale", &[self.n, self.k / 16])?;
                self.expect_elements("weight_global_scale", DType::F32, 1)?;
                self.finish(Storage::Nvfp4, Sharing::Group { size: 16 }, scale)
            }
            (DType::U8, DType::U8 | DType::F8E8M0) => {
                if !self.k.is_multiple_of(32) {
                    return Err(self.bad(leaf, format!("{} inputs are not a multiple of 32", self.k)));
                }
                let columns = self.source.info(&self.name(leaf)).and_then(|info| info.shape.get(1).copied());
                if columns == Some(self.k / 4 * 3) {
                    return Err(Error::unsupported(
                        self.source.file_of(&self.name(leaf)),
                        format!("`{}` is mxfp6-pack-quantized", self.module),
                        "quantize to MXFP4 or MXFP8 instead",
                    ));
                }
                self.expect_shape(leaf, &[self.n, self.k / 2])?;
                self.expect_shape("weight_scale", &[self.n, self.k / 32])?;
                self.finish(Storage::Mxfp4, Sharing::Group { size: 32 }, scale)
            }
            (packed, scale) => Err(self.bad(
                leaf,
                format!(
                    "dtype {packed} with scales of dtype {scale} is no compressed-tensors format ctq knows"
                ),
            )),
        }
    }

    fn packed_int(&self, leaf: &str, scale: DType, args: &QuantizationArgs) -> Result<Scheme> {
        if args.element != ElementType::Int {
            return Err(self.bad(leaf, "32-bit words hold integers, and the scheme says float"));
        }
        let bits = args.num_bits;
        let info =
            self.source.info(&self.name(leaf)).ok_or_else(|| self.missing(leaf, "its module needs it"))?;
        let words = match info.shape[..] {
            [rows, words] if rows == self.n => words,
            _ => {
                return Err(
                    self.bad(leaf, format!("shape {:?} where [{}, words] is expected", info.shape, self.n))
                );
            }
        };
        let fits = |layout: WordLayout| layout.words(bits, self.k) == words;
        let layout = if fits(WordLayout::Dense) {
            WordLayout::Dense
        } else if fits(WordLayout::Padded) {
            WordLayout::Padded
        } else {
            return Err(self.bad(
                leaf,
                format!(
                    "{words} words a row where {} inputs of {bits} bits take {}",
                    self.k,
                    WordLayout::Dense.words(bits, self.k)
                ),
            ));
        };
        self.check_stated_shape()?;
        let sharing = self.affine_sharing(scale, args)?;
        let mut scheme = self.finish(Storage::PackedInt { bits, layout }, sharing, scale)?;
        scheme.zeros = self.zeros(args, sharing, Some((bits, layout)))?;
        scheme.act_order = self.act_order(args, sharing)?;
        Ok(scheme)
    }

    fn plain(&self, weight: DType, scale: DType, weights: Option<&QuantizationArgs>) -> Result<Scheme> {
        if weight.is_dense_float() {
            return Err(Error::unsupported(
                self.source.file_of(&self.name("weight")),
                format!(
                    "`{}` has a scale beside a {weight} weight: calibrated, not yet compressed",
                    self.module
                ),
                "save the model with save_compressed=True",
            ));
        }
        let args = self.args(weights, "weight")?;
        self.expect_shape("weight", &[self.n, self.k])?;
        match (weight, scale, args.element) {
            (DType::I8, _, ElementType::Int) => {
                let sharing = self.affine_sharing(scale, args)?;
                let mut scheme = self.finish(Storage::PlainInt { bits: args.num_bits }, sharing, scale)?;
                scheme.zeros = self.zeros(args, sharing, None)?;
                scheme.act_order = self.act_order(args, sharing)?;
                Ok(scheme)
            }
            (DType::F8E4M3, DType::U8 | DType::F8E8M0, ElementType::Float) => {
                if !self.k.is_multiple_of(32) {
                    return Err(self.bad("weight", format!("{} inputs are not a multiple of 32", self.k)));
                }
                self.expect_shape("weight_scale", &[self.n, self.k / 32])?;
                self.finish(Storage::Mxfp8, Sharing::Group { size: 32 }, scale)
            }
            (DType::F8E4M3, _, ElementType::Float) => {
                if !args.symmetric {
                    return Err(self.bad("weight", "fp8 with zero points is not supported"));
                }
                let sharing = self.affine_sharing(scale, args)?;
                let mut scheme = self.finish(Storage::PlainFp8, sharing, scale)?;
                scheme.act_order = self.act_order(args, sharing)?;
                Ok(scheme)
            }
            (weight, _, _) => Err(self.bad(
                "weight",
                format!(
                    "dtype {weight} does not fit the scheme, which says {:?} of {} bits",
                    args.element, args.num_bits
                ),
            )),
        }
    }

    /// Sharing of float scales, checked against their count.
    fn affine_sharing(&self, scale: DType, args: &QuantizationArgs) -> Result<Sharing> {
        if !scale.is_dense_float() {
            return Err(
                self.bad("weight_scale", format!("dtype {scale}; this format has BF16, F16 or F32 scales"))
            );
        }
        let sharing = match args.strategy {
            Strategy::Tensor => Sharing::Tensor,
            Strategy::Channel => Sharing::Channel,
            Strategy::Group { size } | Strategy::TensorGroup { size } => Sharing::Group { size },
            Strategy::Block { rows, columns } => Sharing::Block { rows, columns },
            Strategy::Token | Strategy::AttentionHead => {
                return Err(self.bad("weight_scale", "the scheme's strategy is not one for weights"));
            }
        };
        if let Sharing::Group { size } = sharing
            && !self.k.is_multiple_of(size)
        {
            return Err(
                self.bad("weight_scale", format!("groups of {size} do not divide the {} inputs", self.k))
            );
        }
        let (rows, columns) = sharing.shape(self.n, self.k);
        self.expect_elements("weight_scale", scale, rows * columns)?;
        Ok(sharing)
    }

    /// Scales come as [N], [N,1], [1], [] and [1,1]: what counts is how many there are.
    fn expect_elements(&self, leaf: &str, dtype: DType, expected: usize) -> Result<()> {
        let info =
            self.source.info(&self.name(leaf)).ok_or_else(|| self.missing(leaf, "the scheme needs it"))?;
        if info.dtype != dtype {
            return Err(self.bad(leaf, format!("dtype {} where {dtype} is expected", info.dtype)));
        }
        let found: usize = info.shape.iter().product();
        if found != expected {
            return Err(self.bad(
                leaf,
                format!(
                    "shape {:?} holds {found} values where {expected} are expected for {} outputs and {} inputs",
                    info.shape, self.n, self.k
                ),
            ));
        }
        Ok(())
    }

    fn check_stated_shape(&self) -> Result<()> {
        let name = self.name("weight_shape");
        let Some(tensor) = self.source.tensor(&name)? else { return Ok(()) };
        let stated: Vec<i64> = match tensor.dtype {
            DType::I64 => {
                tensor.bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8"))).collect()
            }
            DType::I32 => tensor
                .bytes
                .chunks_exact(4)
                .map(|b| i32::from_le_bytes(b.try_into().expect("4")).into())
                .collect(),
            other => return Err(self.bad("weight_shape", format!("dtype {other} where I64 is expected"))),
        };
        if stated != [self.n as i64, self.k as i64] {
            return Err(self.bad(
                "weight_shape",
                format!("says {stated:?}, and config.json makes this linear [{}, {}]", self.n, self.k),
            ));
        }
        Ok(())
    }

    fn zeros(
        &self,
        args: &QuantizationArgs,
        sharing: Sharing,
        packing: Option<(u8, WordLayout)>,
    ) -> Result<ZeroStorage> {
        let name = self.name("weight_zero_point");
        let Some(info) = self.source.info(&name) else {
            if args.symmetric {
                return Ok(ZeroStorage::None);
            }
            return Err(self.missing("weight_zero_point", "the scheme is asymmetric"));
        };
        if args.symmetric {
            // Old writers store zeros for symmetric schemes too; anything else contradicts the scheme.
            let tensor =
                self.source.tensor(&name)?.ok_or_else(|| self.missing("weight_zero_point", "just seen"))?;
            let packed_zeros = || {
                let (DType::I32, Some((bits, layout))) = (tensor.dtype, packing) else { return false };
                let (rows, columns) = sharing.shape(self.n, self.k);
                let words = zero_words(bits, layout, rows);
                let stored =
                    tensor.bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("4")));
                // Packed along the rows: [words, columns].
                stored.eq(words.into_iter().flat_map(|word| std::iter::repeat_n(word, columns)))
            };
            if tensor.bytes.iter().any(|byte| *byte != 0) && !packed_zeros() {
                return Err(self.bad("weight_zero_point", "is not zero, and the scheme is symmetric"));
            }
            return Ok(ZeroStorage::None);
        }
        let (rows, columns) = sharing.shape(self.n, self.k);
        match (info.dtype, packing) {
            (DType::I8, _) => {
                self.expect_elements("weight_zero_point", DType::I8, rows * columns)?;
                Ok(ZeroStorage::Plain)
            }
            (DType::I32, Some((bits, layout))) => {
                self.expect_shape("weight_zero_point", &[layout.words(bits, rows), columns])?;
                Ok(ZeroStorage::PackedRows)
            }
            (dtype, _) => {
                Err(self
                    .bad("weight_zero_point", format!("dtype {dtype} where I8 or packed I32 is expected")))
            }
        }
    }

    fn act_order(&self, args: &QuantizationArgs, sharing: Sharing) -> Result<bool> {
        let name = self.name("weight_g_idx");
        let Some(tensor) = self.source.tensor(&name)? else {
            if args.act_order == ActOrder::Group && matches!(sharing, Sharing::Group { .. }) {
                return Err(
                    self.missing("weight_g_idx", "`actorder` is `group`, so each column's group is stored")
                );
            }
            return Ok(false);
        };
        self.expect_elements("weight_g_idx", DType::I32, self.k)?;
        let groups: Vec<i32> =
            tensor.bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().expect("4"))).collect();
        // The library takes a -1 anywhere to mean that columns are in order.
        if groups.contains(&-1) {
            return Ok(false);
        }
        let Sharing::Group { size } = sharing else { return Ok(false) };
        let mut counts = vec![0_usize; self.k.div_ceil(size)];
        for group in groups {
            match usize::try_from(group).ok().and_then(|group| counts.get_mut(group)) {
                Some(count) => *count += 1,
                None => return Err(self.bad("weight_g_idx", format!("names group {group}, out of range"))),
            }
        }
        match counts.iter().position(|count| *count != size) {
            None => Ok(true),
            Some(group) => Err(self.bad(
                "weight_g_idx",
                format!("gives group {group} {} columns where {size} are expected", counts[group]),
            )),
        }
    }

    /// The scheme with its activations; zero points and act-order are filled in by the formats that have them.
    fn finish(&self, storage: Storage, sharing: Sharing, scale_dtype: DType) -> Result<Scheme> {
        let (input, output) = self.activations()?;
        Ok(Scheme {
            storage,
            sharing,
            scale_dtype: Some(scale_dtype),
            zeros: ZeroStorage::None,
            act_order: false,
            input,
            output,
        })
    }

    /// How the group quantizes the module's inputs and outputs.
    fn activations(&self) -> Result<(Option<Activation>, Option<Activation>)> {
        let input = self.group.and_then(|group| group.input_activations.as_ref());
        let output = self.group.and_then(|group| group.output_activations.as_ref());
        Ok((
            input.map(|args| self.activation(args, "input")).transpose()?,
            output.map(|args| self.activation(args, "output")).transpose()?,
        ))
    }

    fn activation(&self, args: &QuantizationArgs, side: &str) -> Result<Activation> {
        let activation = activation(args).map_err(|what| {
            Error::unsupported(
                self.source.config().path(),
                format!("{side} activations of `{}`: {what}", self.module),
                "quantize with one of the presets of compressed-tensors",
            )
        })?;
        match activation.scale {
            ActivationScale::Static => {
                let leaf = format!("{side}_scale");
                let dtype = self
                    .dtype(&leaf)
                    .ok_or_else(|| self.missing(&leaf, "the scheme's activations are static"))?;
                if !dtype.is_dense_float() {
                    return Err(self.bad(&leaf, format!("dtype {dtype} where a float is expected")));
                }
                self.expect_elements(&leaf, dtype, 1)?;
                if !activation.symmetric {
                    self.expect_elements(&format!("{side}_zero_point"), DType::I8, 1)?;
                }
            }
            ActivationScale::Local => self.expect_elements(&format!("{side}_global_scale"), DType::F32, 1)?,
            ActivationScale::Dynamic | ActivationScale::PowerOfTwo => {}
        }
        if let ActivationSharing::Group { size } = activation.sharing {
            let width = if side == "input" { self.k } else { self.n };
            if width % size != 0 {
                return Err(
                    self.bad("weight", format!("{side} groups of {size} do not divide {width} features"))
                );
            }
        }
        Ok(activation)
    }
}

/// The words of `count` packed zeros, each stored as its offset `2^(bits-1)`.
fn zero_words(bits: u8, layout: WordLayout, count: usize) -> Vec<u32> {
    let mut words = vec![0_u32; layout.words(bits, count)];
    let bits = usize::from(bits);
    for value in 0..count {
        // The highest bit of the value is the one that is set.
        let (word, bit) = match layout {
            WordLayout::Dense => ((value * bits + bits - 1) / 32, (value * bits + bits - 1) % 32),
            WordLayout::Padded => (value / (32 / bits), value % (32 / bits) * bits + bits - 1),
        };
        words[word] |= 1 << bit;
    }
    words
}

/// Reads activation arguments; fails with what is not supported about them.
pub(crate) fn activation(args: &QuantizationArgs) -> std::result::Result<Activation, String> {
    let code = match (args.element, args.num_bits) {
        (ElementType::Int, bits) => Code::Int { bits },
        (ElementType::Float, 8) => Code::E4m3,
        (ElementType::Float, 4) => Code::E2m1,
        (ElementType::Float, bits) => return Err(format!("float of {bits} bits")),
    };
    if !args.symmetric && args.element == ElementType::Float {
        return Err("asymmetric floats".to_owned());
    }
    let sharing = match args.strategy {
        Strategy::Tensor => ActivationSharing::Tensor,
        Strategy::Token => ActivationSharing::Token,
        Strategy::Group { size } | Strategy::TensorGroup { size } => ActivationSharing::Group { size },
        Strategy::AttentionHead => ActivationSharing::Head,
        Strategy::Channel => return Err("strategy `channel`".to_owned()),
        Strategy::Block { .. } => return Err("strategy `block`".to_owned()),
    };
    let scale = match (args.dynamic, args.strategy) {
        (Dynamic::Static, Strategy::Tensor | Strategy::AttentionHead) => ActivationScale::Static,
        (Dynamic::Static, _) => return Err("static scales other than one for the whole tensor".to_owned()),
        (Dynamic::Local, Strategy::TensorGroup { .. }) => ActivationScale::Local,
        (Dynamic::Local, _) => return Err("`dynamic: local` without `tensor_group`".to_owned()),
        (Dynamic::Dynamic, Strategy::TensorGroup { .. }) => {
            return Err("`tensor_group` without a stored global scale".to_owned());
        }
        (Dynamic::Dynamic, Strategy::Group { size: 32 })
            if args.element == ElementType::Float && args.scale_dtype == Some(ScaleDtype::E8m0) =>
        {
            ActivationScale::PowerOfTwo
        }
        (Dynamic::Dynamic, _) => match args.scale_dtype {
            None | Some(ScaleDtype::Float) => ActivationScale::Dynamic,
            Some(dtype) => return Err(format!("dynamic scales rounded to {dtype:?}")),
        },
    };
    if scale == ActivationScale::Local && code != Code::E2m1 {
        return Err("`dynamic: local` for other than fp4".to_owned());
    }
    Ok(Activation { code, symmetric: args.symmetric, sharing, scale })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_zeros_of_every_layout() {
        assert_eq!(zero_words(4, WordLayout::Dense, 8), [0x8888_8888]);
        assert_eq!(zero_words(8, WordLayout::Padded, 5), [0x8080_8080, 0x80]);
        // Eleven values of 3 bits: the last one's high bit is bit 32 of the string, or bit 2 of the next word.
        assert_eq!(zero_words(3, WordLayout::Dense, 11), [0x2492_4924, 1]);
        assert_eq!(zero_words(3, WordLayout::Padded, 11), [0x2492_4924, 4]);
    }
}

//! Packed matrices of random codes: what is measured instead of a model. Made as fast as memory is written, so that a
//! model can be made layer by layer while it runs. Their scales keep the outputs of a linear as large as its inputs.

use ctq_container::{Bytes, MatrixRecord, ScaleTable, TiledMatrix};
use ctq_model::DType;
use ctq_model::inventory::{Linear, LinearClass};
use ctq_model::matrix::{Code, Formula, Sharing};
use ctq_model::scheme::{
    Activation, ActivationScale, ActivationSharing, Scheme, Storage, WordLayout, ZeroStorage,
};

/// Weights that are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Dense.
    Bf16,
    /// 4-bit integers with a bf16 scale for 128 of a row.
    Int4,
    /// e2m1 with an e4m3 scale for 16 of a row.
    Nvfp4,
    /// e2m1 with a power of two for 32 of a row.
    Mxfp4,
    /// e4m3 with a bf16 scale a row.
    Fp8,
    /// 8-bit integers with a bf16 scale a row.
    Int8,
}

impl Weights {
    /// All of them.
    pub const ALL: [Weights; 6] =
        [Weights::Bf16, Weights::Int4, Weights::Nvfp4, Weights::Mxfp4, Weights::Fp8, Weights::Int8];

    /// Name as printed.
    pub const fn name(self) -> &'static str {
        match self {
            Weights::Bf16 => "bf16",
            Weights::Int4 => "int4 g128",
            Weights::Nvfp4 => "nvfp4",
            Weights::Mxfp4 => "mxfp4",
            Weights::Fp8 => "fp8 channel",
            Weights::Int8 => "int8 channel",
        }
    }

    /// Quantization of activations that serving kernels multiply these weights with; `None`: none that is measured.
    pub fn activation(self) -> Option<Activation> {
        let token = |code| Activation {
            code,
            symmetric: true,
            sharing: ActivationSharing::Token,
            scale: ActivationScale::Dynamic,
        };
        match self {
            Weights::Bf16 | Weights::Mxfp4 => None,
            Weights::Int4 | Weights::Int8 => Some(token(Code::Int { bits: 8 })),
            Weights::Fp8 => Some(token(Code::E4m3)),
            Weights::Nvfp4 => Some(Activation {
                code: Code::E2m1,
                symmetric: true,
                sharing: ActivationSharing::Group { size: 16 },
                scale: ActivationScale::Local,
            }),
        }
    }

    /// An `n` x `k` linear of these weights, as a checkpoint would state it.
    pub fn linear(self, n: usize, k: usize) -> Linear {
        let group = |size| Sharing::Group { size };
        let (storage, sharing, scale_dtype) = match self {
            Weights::Bf16 => (Storage::Dense { dtype: DType::BF16 }, Sharing::Tensor, None),
            Weights::Int4 => {
                let storage = Storage::PackedInt { bits: 4, layout: WordLayout::Dense };
                (storage, group(128), Some(DType::BF16))
            }
            Weights::Nvfp4 => (Storage::Nvfp4, group(16), Some(DType::F8E4M3)),
            Weights::Mxfp4 => (Storage::Mxfp4, group(32), Some(DType::U8)),
            Weights::Fp8 => (Storage::PlainFp8, Sharing::Channel, Some(DType::BF16)),
            Weights::Int8 => (Storage::PlainInt { bits: 8 }, Sharing::Channel, Some(DType::BF16)),
        };
        let scheme = Scheme {
            storage,
            sharing,
            scale_dtype,
            zeros: ZeroStorage::None,
            act_order: false,
            input: None,
            output: None,
        };
        Linear { module: self.name().to_owned(), n, k, class: LinearClass::Ffn, scheme, bias: false }
    }
}

/// A packed matrix for `linear`, its codes random by `seed`.
pub fn random_tiles(linear: &Linear, seed: u64) -> TiledMatrix {
    let mut codes = vec![0; MatrixRecord::of(linear).codes];
    Noise::new(linear, seed).fill(&mut codes);
    tiles_of(linear, codes.into())
}

/// The packed matrix of `linear` whose codes are `codes`: one scale everywhere, about as small as `sqrt(k)` of its largest
/// codes are large.
///
/// # Panics
/// If the scheme of `linear` has zero points or act-order, or its scales are of a type that no measured scheme has.
pub fn tiles_of(linear: &Linear, codes: Bytes) -> TiledMatrix {
    let record = MatrixRecord::of(linear);
    assert_eq!(
        (record.zeros, record.permutation),
        (0, 0),
        "no matrix with zero points or act-order is measured"
    );
    let exponent = shrinking_exponent(linear);
    let scales = record.sharing.zip(record.scale_dtype).map(|(sharing, dtype)| {
        let count = ScaleTable::elements(sharing, record.n, record.k);
        ScaleTable { dtype, sharing, bytes: power_of_two(dtype, exponent).repeat(count).into() }
    });
    TiledMatrix {
        n: record.n,
        k: record.k,
        code: record.code,
        formula: record.formula,
        codes,
        scales,
        zeros: None,
        // A divisor, so that it has the other sign.
        global_scale: (record.formula == Formula::Nvfp4)
            .then(|| (1_u64 << exponent) as f32)
            .map(f32::to_bits),
        permutation: None,
    }
}

/// `e` such that random codes divided by `2^e` make outputs about as large as inputs.
fn shrinking_exponent(linear: &Linear) -> u32 {
    // Root mean square of random codes.
    let size = match linear.scheme.storage.code() {
        Code::Int { bits } => f64::from(1_u16 << bits) / 12.0_f64.sqrt(),
        Code::E2m1 => 2.9,
        Code::E4m3 => 68.0,
        Code::Bf16 | Code::F16 | Code::F32 => 1.0,
    };
    (size * (linear.k as f64).sqrt()).log2().round().max(0.0) as u32
}

/// `2^-exponent` as a scale; of fp8 scales 1, for these have a global one beside them.
fn power_of_two(dtype: DType, exponent: u32) -> Vec<u8> {
    match dtype {
        DType::BF16 => (((127 - exponent) << 7) as u16).to_le_bytes().to_vec(),
        DType::U8 => vec![(127 - exponent) as u8],
        DType::F8E4M3 => vec![0x38],
        DType::Bool
        | DType::I8
        | DType::U16
        | DType::I16
        | DType::F16
        | DType::U32
        | DType::I32
        | DType::F32
        | DType::U64
        | DType::I64
        | DType::F64
        | DType::F8E5M2
        | DType::F8E8M0 => unreachable!("no scheme that is measured has scales of dtype {dtype}"),
    }
}

/// Random codes, one run after the other: eight generators (xorshift, Marsaglia 2003) side by side, for speed.
pub struct Noise {
    lanes: [u64; 8],
    /// Bits that stay random.
    keep: u64,
    /// Bits that are set in all words.
    set: u64,
}

impl Noise {
    /// Codes for `linear`, the same for the same seed.
    pub fn new(linear: &Linear, seed: u64) -> Noise {
        let (keep, set) = match linear.scheme.storage.code() {
            // Not the code of NaN.
            Code::E4m3 => (0xf7f7_f7f7_f7f7_f7f7, 0),
            Code::Bf16 => {
                // Sign and mantissa are random, and the last bit of an exponent that makes small numbers.
                let exponent = u64::from((127 - shrinking_exponent(linear)) >> 1);
                (0x80ff_80ff_80ff_80ff, exponent << 8 | exponent << 24 | exponent << 40 | exponent << 56)
            }
            Code::Int { .. } | Code::E2m1 => (u64::MAX, 0),
            Code::F16 | Code::F32 => unreachable!("no matrix of wide floats is measured"),
        };
        let lane = |index: usize| {
            // SplitMix64 (Steele et al. 2014): neighbouring seeds must not give neighbouring numbers, and no lane is 0.
            let mut state =
                seed.wrapping_mul(8).wrapping_add(index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (state ^ (state >> 31)) | 1
        };
        Noise { lanes: std::array::from_fn(lane), keep, set }
    }

    /// The next codes. Runs whose length is a multiple of 64 bytes may be asked for in any cut.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        let mut words = [0_u64; 8];
        for chunk in bytes.chunks_mut(64) {
            for (word, lane) in words.iter_mut().zip(&mut self.lanes) {
                *lane ^= *lane << 13;
                *lane ^= *lane >> 7;
                *lane ^= *lane << 17;
                *word = *lane & self.keep | self.set;
            }
            for (out, word) in chunk.chunks_mut(8).zip(&words) {
                out.copy_from_slice(&word.to_le_bytes()[..out.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Pieces};
    use crate::cpu::Cpu;

    #[test]
    fn weights_are_finite_and_as_large_as_they_should_be() {
        let (n, k) = (64, 256);
        for weights in Weights::ALL {
            let tiles = random_tiles(&weights.linear(n, k), 7);
            let cpu = Cpu::detect();
            let matrix = cpu.matrix(&tiles, 0..n, Pieces::Atoms).expect("a matrix");
            let ids: Vec<u32> = (0..n as u32).collect();
            let values = cpu.download(&cpu.embed(&matrix, &ids).expect("weights")).expect("weights");
            let square: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
            let gain = (square / n as f64).sqrt();
            assert!((0.4..2.5).contains(&gain), "{}: {gain}", weights.name());
        }
    }

    #[test]
    fn codes_do_not_depend_on_how_they_are_asked_for() {
        let linear = Weights::Int4.linear(64, 256);
        let whole = random_tiles(&linear, 3);
        let mut cut = vec![0; whole.codes.len()];
        let mut noise = Noise::new(&linear, 3);
        let (first, rest) = cut.split_at_mut(64 * 5);
        noise.fill(first);
        noise.fill(rest);
        assert_eq!(cut, *whole.codes);
        assert_ne!(*random_tiles(&linear, 4).codes, *whole.codes);
    }
}

//! Activation quantization in place: every kind of scheme, on values that go wrong in every way.

use ctq_model::matrix::Code;
use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};

use super::rows::windows;
use super::{Bound, Case, Findings, Size};
use crate::backend::{Backend, KernelError, Quantizer};
use crate::random::Random;

/// How an activation is quantized.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    activation: Activation,
}

const INT8: Code = Code::Int { bits: 8 };
const INT4: Code = Code::Int { bits: 4 };

const fn kind(
    name: &'static str,
    code: Code,
    sharing: ActivationSharing,
    scale: ActivationScale,
    symmetry: Symmetry,
) -> Kind {
    let symmetric = matches!(symmetry, Symmetry::Symmetric);
    Kind { name, activation: Activation { code, symmetric, sharing, scale } }
}

/// Whether there is a zero point.
#[derive(Clone, Copy, PartialEq)]
enum Symmetry {
    Symmetric,
    Asymmetric,
}

use ActivationScale::{Dynamic, Local, PowerOfTwo, Static};
use ActivationSharing::{Group, Head, Tensor, Token};
use Symmetry::{Asymmetric, Symmetric};

pub(super) const KINDS: &[Kind] = &[
    kind("int8 token", INT8, Token, Dynamic, Symmetric),
    kind("int8 token asymmetric", INT8, Token, Dynamic, Asymmetric),
    kind("int8 tensor", INT8, Tensor, Dynamic, Symmetric),
    kind("int8 tensor static", INT8, Tensor, Static, Symmetric),
    kind("int8 tensor static asymmetric", INT8, Tensor, Static, Asymmetric),
    kind("int4 g32", INT4, Group { size: 32 }, Dynamic, Symmetric),
    kind("fp8 token", Code::E4m3, Token, Dynamic, Symmetric),
    kind("fp8 tensor", Code::E4m3, Tensor, Dynamic, Symmetric),
    kind("fp8 tensor static", Code::E4m3, Tensor, Static, Symmetric),
    kind("fp8 g128", Code::E4m3, Group { size: 128 }, Dynamic, Symmetric),
    kind("fp8 head static", Code::E4m3, Head, Static, Symmetric),
    kind("nvfp4", Code::E2m1, Group { size: 16 }, Local, Symmetric),
    kind("mxfp4", Code::E2m1, Group { size: 32 }, PowerOfTwo, Symmetric),
    kind("mxfp8", Code::E4m3, Group { size: 32 }, PowerOfTwo, Symmetric),
];

impl Kind {
    /// The kind of a name.
    pub(super) fn named(name: &str) -> Kind {
        *KINDS.iter().find(|kind| kind.name == name).expect("a kind of the list")
    }

    /// Whether codes are integers.
    pub(super) fn is_integer(self) -> bool {
        matches!(self.activation.code, Code::Int { .. })
    }

    /// With stored scales where it has any: one, or one for each of `heads`.
    pub(super) fn quantizer(self, heads: usize) -> Quantizer {
        let scales = match (self.activation.scale, self.activation.sharing) {
            (Static, Head) => (0..heads).map(|head| 0.004 + 0.003 * head as f32).collect(),
            (Static, Tensor | Token | Group { .. }) => vec![0.013],
            (Dynamic | Local | PowerOfTwo, _) => Vec::new(),
        };
        let zero = if self.activation.symmetric { 0.0 } else { 5.0 };
        Quantizer { activation: self.activation, scales, zero, global_scale: 211.25 }
    }
}

struct QuantizeCase {
    kind: Kind,
    rows: usize,
    width: usize,
    values: Values,
}

#[derive(Clone, Copy, Debug)]
enum Values {
    Ordinary,
    /// Zeros of both signs, subnormals, the largest numbers, infinities and NaN.
    Awkward,
}

const HEAD_DIM: usize = 64;

pub(super) fn cases<S: Backend, E: Backend>(findings: &mut Findings<'_, S, E>, size: Size) {
    let shapes: &[(usize, usize)] = match size {
        Size::Small => &[(1, 128), (9, 384)],
        Size::Large => &[(1, 128), (700, 4096)],
    };
    for kind in KINDS {
        for (rows, width) in shapes.iter().copied() {
            for values in [Values::Ordinary, Values::Awkward] {
                findings.hold(&QuantizeCase { kind: *kind, rows, width, values });
            }
        }
    }
}

impl Case for QuantizeCase {
    fn operation(&self) -> &'static str {
        "quantize"
    }

    fn name(&self) -> String {
        format!("{}, {:?} values of {} x {}", self.kind.name, self.values, self.rows, self.width)
    }

    fn bound(&self) -> Bound {
        Bound::Bits
    }

    fn run<B: Backend>(&self, backend: &B) -> Result<Vec<f32>, KernelError> {
        let mut random = Random::new(2);
        let mut values = random.activations(self.rows * self.width);
        if let Values::Awkward = self.values {
            const AWKWARD: [f32; 10] =
                [0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 448.0, 0.015_625, f32::INFINITY, f32::NAN];
            for value in values.iter_mut().step_by(7) {
                // The last two ruin their whole run: rarely.
                let among = if random.below(24) == 0 { AWKWARD.len() } else { AWKWARD.len() - 2 };
                *value = AWKWARD[random.below(among)];
            }
            // A run of nothing but zeros.
            values[..32].fill(0.0);
        }
        let mut x = backend.upload(self.width, &values)?;
        let quantizer = self.kind.quantizer(self.width / HEAD_DIM);
        backend.fake_quantize(&mut x, &quantizer, HEAD_DIM, &windows(self.rows))?;
        backend.download(&x)
    }
}

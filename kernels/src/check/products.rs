//! Products of activations and packed weights: the operand bits, linears in every mode, experts, heads; and that rows
//! and shards by themselves give the bits of the whole.

use std::ops::Range;

use super::activations::Kind;
use super::matrices::{SCHEMES, Scheme};
use super::rows::windows;
use super::{Bound, Case, Findings, Size};
use crate::Compute;
use crate::backend::{Backend, KernelError, Pieces, Treatment};
use crate::random::Random;

/// Exact products, f32 sums in another order.
const BF16: Bound = Bound::Relative(5e-5);

pub(super) fn cases<S: Backend, E: Backend>(findings: &mut Findings<'_, S, E>, size: Size) {
    let shapes: &[(usize, usize, usize)] = match size {
        Size::Small => &[(70, 200, 160), (1, 64, 72)],
        Size::Large => &[(300, 2120, 1000), (2100, 4160, 2048)],
    };
    for scheme in SCHEMES {
        for (m, n, k) in shapes.iter().copied() {
            findings.hold(&Weights { scheme: *scheme, n, k });
            for compute in [Compute::F32, Compute::Bf16] {
                linear(findings, Linear::new(*scheme, Acts::Off, compute, (m, n, k)));
            }
        }
    }
    let library = Acts::Library(Kind::named("fp8 token"));
    linear(findings, Linear::new(Scheme::named("fp8 channel"), library, Compute::Bf16, (37, 90, 256)));
}

/// Products of codes with codes.
pub(super) fn codes<S: Backend, E: Backend>(findings: &mut Findings<'_, S, E>, size: Size) {
    // k that groups of activations and of weights both divide.
    let (m, n, k) = match size {
        Size::Small => (70, 90, 384),
        Size::Large => (520, 1100, 4096),
    };
    for (scheme, kind) in EXACT {
        for compute in [Compute::F32, Compute::Bf16] {
            let (scheme, kind) = (Scheme::named(scheme), Kind::named(kind));
            linear(findings, Linear::new(scheme, Acts::Exact(kind), compute, (m, n, k)));
        }
    }
    // The last tile is not full: what lies behind k must not count.
    for (scheme, kind) in [
        ("int8 channel", "int8 token asymmetric"),
        ("int8 tensor asymmetric", "int8 token"),
        ("int8 tensor asymmetric", "int8 tensor static asymmetric"),
        ("fp8 channel", "fp8 token"),
    ] {
        let (scheme, kind) = (Scheme::named(scheme), Kind::named(kind));
        findings.hold(&Linear::new(scheme, Acts::Exact(kind), Compute::Bf16, (9, n, k - 20)));
    }
}

/// Products of large matrices, and of many tiles.
pub(super) fn large<S: Backend, E: Backend>(findings: &mut Findings<'_, S, E>, size: Size) {
    // Large enough for a device to decode the matrix first and leave the product to a library.
    for scheme in ["int4 g128", "nvfp4"] {
        let large = Linear::new(Scheme::named(scheme), Acts::Off, Compute::Bf16, (3, 2064, 1024));
        match size {
            Size::Small => findings.hold(&large),
            Size::Large => linear(findings, large),
        }
    }
    // More stages than there is room for at once, blocks that stay for several tiles, segments of whole stages.
    let (m, n, k) = match size {
        Size::Small => (270, 200, 1000),
        Size::Large => (2100, 4160, 2120),
    };
    for (scheme, kind, k) in [
        ("int8 channel", "int8 token", k),
        ("int8 tensor asymmetric", "int8 token asymmetric", k),
        ("int4 g128", "int8 token", k / 128 * 128 + 256),
        ("fp8 channel", "fp8 token", k),
    ] {
        let exact = Acts::Exact(Kind::named(kind));
        findings.hold(&Linear::new(Scheme::named(scheme), exact, Compute::Bf16, (m, n, k)));
    }
}

/// Experts, and heads.
pub(super) fn heads<S: Backend, E: Backend>(findings: &mut Findings<'_, S, E>) {
    for scheme in ["bf16", "int4 g128", "nvfp4"] {
        for compute in [Compute::F32, Compute::Bf16] {
            let scheme = Scheme::named(scheme);
            findings.hold(&Experts { scheme, compute, n: 48, k: 128 });
            findings.hold(&Head { scheme, compute, rows: 19, vocabulary: 700, k: 128 });
        }
    }
}

/// A linear on both backends, and on the subject in pieces.
fn linear<S: Backend, E: Backend>(findings: &mut Findings<'_, S, E>, whole: Linear) {
    findings.hold(&whole);
    let (m, n) = (whole.m, whole.n);
    if m > 1 {
        findings
            .same(&Linear { taken: m / 3..m, ..whole.clone() }, &Linear { shown: m / 3..m, ..whole.clone() });
        // A shard may begin at any atom of 16 rows.
        let cuts = [n / 3 / 16 * 16, n * 2 / 3 / 16 * 16];
        let shards = vec![0..cuts[0], cuts[0]..cuts[1], cuts[1]..n];
        findings.same(&Linear { shards, ..whole.clone() }, &whole);
    }
}

/// Weights and activations that have an exact product.
const EXACT: [(&str, &str); 9] = [
    ("int8 channel", "int8 token"),
    ("int8 channel", "int8 token asymmetric"),
    ("int4 g128", "int8 token"),
    ("int4 g32 asymmetric", "int4 g32"),
    ("fp8 channel", "fp8 token"),
    ("fp8 block", "fp8 g128"),
    ("nvfp4", "nvfp4"),
    ("mxfp4", "mxfp4"),
    ("mxfp8", "mxfp8"),
];

/// Quantization of the inputs.
#[derive(Clone, Copy, Debug)]
enum Acts {
    Off,
    Library(Kind),
    Exact(Kind),
}

impl Acts {
    fn treatment(self) -> Treatment {
        match self {
            Acts::Off => Treatment::Plain,
            Acts::Library(kind) => Treatment::FakeQuantized(kind.quantizer(1)),
            Acts::Exact(kind) => Treatment::Exact(kind.quantizer(1)),
        }
    }
}

#[derive(Clone)]
struct Linear {
    scheme: Scheme,
    acts: Acts,
    compute: Compute,
    m: usize,
    n: usize,
    k: usize,
    /// Rows of activations that the linear is given.
    taken: Range<usize>,
    /// Rows of the result that are looked at, counted from those taken.
    shown: Range<usize>,
    /// Ranges of output rows, each a matrix of its own.
    shards: Vec<Range<usize>>,
}

impl Linear {
    fn new(scheme: Scheme, acts: Acts, compute: Compute, (m, n, k): (usize, usize, usize)) -> Linear {
        let shards = std::iter::once(0..n).collect();
        Linear { scheme, acts, compute, m, n, k, taken: 0..m, shown: 0..usize::MAX, shards }
    }
}

impl Case for Linear {
    fn operation(&self) -> &'static str {
        "linear"
    }

    fn name(&self) -> String {
        let acts = match self.acts {
            Acts::Off => "acts off".to_owned(),
            Acts::Library(kind) => format!("acts library {}", kind.name),
            Acts::Exact(kind) => format!("acts kernel {}", kind.name),
        };
        let (scheme, compute) = (self.scheme.name, self.compute);
        format!(
            "{scheme}, {acts}, {compute:?}, rows {:?} of {} x {} in {:?}",
            self.taken, self.m, self.k, self.shards
        )
    }

    fn bound(&self) -> Bound {
        match (self.compute, self.acts) {
            (Compute::F32, _) => Bound::Bits,
            // Sums of integers are exact.
            (Compute::Bf16, Acts::Exact(kind)) if kind.is_integer() => Bound::Bits,
            (Compute::Bf16, _) => BF16,
        }
    }

    fn run<B: Backend>(&self, backend: &B) -> Result<Vec<f32>, KernelError> {
        let mut random = Random::new(4);
        let matrix = self.scheme.matrix(self.n, self.k, &mut random);
        let values = random.activations(self.m * self.k);
        let bias = random.floats(self.n);
        let x = backend.upload(self.k, &values[self.taken.start * self.k..self.taken.end * self.k])?;
        let rows = self.taken.len();
        // Rows taken by themselves are one window: no treatment here looks beyond a row.
        let windows = if rows < self.m { std::iter::once(0..rows).collect() } else { windows(rows) };
        let operand = backend.prepare(&x, &self.acts.treatment(), self.compute, &windows)?;
        let mut parts = Vec::new();
        for shard in &self.shards {
            let weight = backend.matrix(&matrix, shard.clone(), Pieces::Atoms)?;
            parts.push(backend.linear(&operand, &weight, Some(&bias), self.compute)?);
        }
        let all = backend.download(&backend.concatenate(&parts.iter().collect::<Vec<_>>())?)?;
        let shown = self.shown.start.min(rows)..self.shown.end.min(rows);
        Ok(all[shown.start * self.n..shown.end * self.n].to_vec())
    }
}

/// The decompressed weights, looked up row by row.
struct Weights {
    scheme: Scheme,
    n: usize,
    k: usize,
}

impl Case for Weights {
    fn operation(&self) -> &'static str {
        "weights"
    }

    fn name(&self) -> String {
        format!("{} {} x {}", self.scheme.name, self.n, self.k)
    }

    fn bound(&self) -> Bound {
        Bound::Bits
    }

    fn run<B: Backend>(&self, backend: &B) -> Result<Vec<f32>, KernelError> {
        let matrix = self.scheme.matrix(self.n, self.k, &mut Random::new(5));
        // Rows from the middle of a tile, backwards, one of them twice.
        let first = 16.min(self.n - 1);
        let held = backend.matrix(&matrix, first..self.n, Pieces::Atoms)?;
        let mut ids: Vec<u32> = (0..(self.n - first) as u32).rev().collect();
        ids.push(0);
        backend.download(&backend.embed(&held, &ids)?)
    }
}

/// Several linears of different inputs at once.
struct Experts {
    scheme: Scheme,
    compute: Compute,
    n: usize,
    k: usize,
}

impl Case for Experts {
    fn operation(&self) -> &'static str {
        "experts"
    }

    fn name(&self) -> String {
        format!("{}, {:?}, {} x {}", self.scheme.name, self.compute, self.n, self.k)
    }

    fn bound(&self) -> Bound {
        match self.compute {
            Compute::F32 => Bound::Bits,
            Compute::Bf16 => BF16,
        }
    }

    fn run<B: Backend>(&self, backend: &B) -> Result<Vec<f32>, KernelError> {
        let mut random = Random::new(6);
        let (mut operands, mut matrices) = (Vec::new(), Vec::new());
        for rows in [5, 1, 70, 64] {
            let matrix = self.scheme.matrix(self.n, self.k, &mut random);
            let x = backend.upload(self.k, &random.activations(rows * self.k))?;
            operands.push(backend.prepare(&x, &Treatment::Plain, self.compute, &windows(rows))?);
            matrices.push(backend.matrix(&matrix, 0..self.n, Pieces::Atoms)?);
        }
        let weights: Vec<&B::Matrix> = matrices.iter().collect();
        let biases = vec![None; weights.len()];
        let mut all = Vec::new();
        let operands: Vec<&B::Operand> = operands.iter().collect();
        for output in backend.linear_experts(&operands, &weights, &biases, self.compute)? {
            all.extend(backend.download(&output)?);
        }
        Ok(all)
    }
}

/// Partial log-sum-exps of the vocabulary.
struct Head {
    scheme: Scheme,
    compute: Compute,
    rows: usize,
    vocabulary: usize,
    k: usize,
}

impl Case for Head {
    fn operation(&self) -> &'static str {
        "head"
    }

    fn name(&self) -> String {
        format!("{}, {:?}, {} rows of {}", self.scheme.name, self.compute, self.rows, self.vocabulary)
    }

    fn bound(&self) -> Bound {
        match self.compute {
            Compute::F32 => Bound::Bits,
            Compute::Bf16 => BF16,
        }
    }

    fn run<B: Backend>(&self, backend: &B) -> Result<Vec<f32>, KernelError> {
        let mut random = Random::new(7);
        let matrix = self.scheme.matrix(self.vocabulary, self.k, &mut random);
        // Logits of a few units.
        let values: Vec<f32> = random.floats(self.rows * self.k).iter().map(|value| value * 0.3).collect();
        let x = backend.upload(self.k, &values)?;
        let operand = backend.prepare(&x, &Treatment::Plain, self.compute, &windows(self.rows))?;
        let head = backend.matrix(&matrix, 0..self.vocabulary, Pieces::VocabularyTiles)?;
        let targets: Vec<Option<u32>> =
            (0..self.rows).map(|row| Some((row * 97 % self.vocabulary) as u32)).collect();
        let mut all = Vec::new();
        for part in [0..384, 384..self.vocabulary - 1] {
            let tiles = backend.head(&operand, &head, part, &targets, self.compute)?;
            // What a score is made of: the log of each tile's sum of exponentials, and the targets.
            let fold = |(largest, sum): &(f32, f64)| (f64::from(*largest) + libm::log(*sum)) as f32;
            all.extend(tiles.partials.iter().map(fold));
            all.extend(tiles.targets.iter().map(|target| target.unwrap_or(0.0)));
        }
        Ok(all)
    }
}

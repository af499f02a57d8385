//! Every operation of one backend held against another on random data of awkward sizes.
//!
//! The CPU backend is the one to hold against: its own tests hold it against plain loops and against values made by
//! other people's code. With [`Compute::F32`](crate::Compute::F32) both must give the same bits, with bf16 they may sum
//! in another order. A device is also held against itself: rows taken alone and shards of a matrix must give the bits
//! of the whole.
//!
//! Used by the tests of the CUDA kernels, by their planted bugs, and by `ctq doctor --check` on a real device.

mod activations;
mod attention;
mod fused;
mod library;
mod matrices;
mod products;
mod rows;

pub use self::library::{Observation, observe_library};

use crate::backend::{Backend, KernelError};

/// How close two results must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// Every bit equal.
    Bits,
    /// Frobenius norm of the difference over that of the expected values.
    Relative(f64),
}

/// How large the cases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// For an emulation: seconds in all.
    Small,
    /// For a device: tiles, chunks and grids of the sizes that models have.
    Large,
}

/// What came of one case.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The operation.
    pub operation: &'static str,
    /// What it was given.
    pub case: String,
    /// How close the results had to be.
    pub bound: Bound,
    /// Relative error; infinite where an operation failed or a result is not finite.
    pub error: f64,
    /// What is wrong, where something is.
    pub failure: Option<String>,
}

/// Operations that are held together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// Norms, gates, rotations, rows by their numbers, experts.
    Rows,
    /// Quantization of activations.
    Activations,
    /// Attention.
    Attention,
    /// Linears of values.
    Products,
    /// Linears of codes.
    Codes,
    /// Linears of many tiles, or large enough for a library.
    Large,
    /// Products of several experts, and partial log-sum-exps of a head.
    Heads,
    /// What a device may do in one pass.
    Fused,
}

impl Area {
    /// Every operation.
    pub const ALL: &[Area] = &[
        Area::Rows,
        Area::Activations,
        Area::Attention,
        Area::Products,
        Area::Codes,
        Area::Large,
        Area::Heads,
        Area::Fused,
    ];
}

/// How far a comparison goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All cases.
    Everything,
    /// Up to the first case that fails.
    FirstFailure,
    /// The same, of so many cases at most.
    Beginning(usize),
}

/// Runs the cases of some areas on `subject` and on `expected`.
pub fn compare<S: Backend, E: Backend>(
    subject: &S,
    expected: &E,
    areas: &[Area],
    size: Size,
    extent: Extent,
) -> Vec<Finding> {
    let mut findings = Findings { subject, expected, extent, all: Vec::new() };
    for area in areas {
        match area {
            Area::Rows => rows::cases(&mut findings, size),
            Area::Activations => activations::cases(&mut findings, size),
            Area::Attention => attention::cases(&mut findings, size),
            Area::Products => products::cases(&mut findings, size),
            Area::Codes => products::codes(&mut findings, size),
            Area::Large => products::large(&mut findings, size),
            Area::Heads => products::heads(&mut findings),
            Area::Fused => fused::cases(&mut findings, size),
        }
    }
    findings.all
}

/// One thing to compute on any backend.
trait Case {
    fn operation(&self) -> &'static str;
    fn name(&self) -> String;
    fn bound(&self) -> Bound;
    fn run<B: Backend>(&self, backend: &B) -> Result<Vec<f32>, KernelError>;
}

struct Findings<'a, S, E> {
    subject: &'a S,
    expected: &'a E,
    extent: Extent,
    all: Vec<Finding>,
}

impl<S: Backend, E: Backend> Findings<'_, S, E> {
    /// The case on both backends.
    fn hold(&mut self, case: &impl Case) {
        if self.done() {
            return;
        }
        let expected = case.run(self.expected);
        self.judge(case, case.run(self.subject), expected, case.bound());
    }

    /// Two cases on the subject that must give the same bits.
    fn same(&mut self, case: &impl Case, whole: &impl Case) {
        if self.done() {
            return;
        }
        let expected = whole.run(self.subject);
        self.judge(case, case.run(self.subject), expected, Bound::Bits);
    }

    fn done(&self) -> bool {
        let failed = self.all.last().is_some_and(|finding| finding.failure.is_some());
        match self.extent {
            Extent::Everything => false,
            Extent::FirstFailure => failed,
            Extent::Beginning(cases) => failed || self.all.len() >= cases,
        }
    }

    fn judge(
        &mut self,
        case: &impl Case,
        found: Result<Vec<f32>, KernelError>,
        expected: Result<Vec<f32>, KernelError>,
        bound: Bound,
    ) {
        let (error, failure) = match (found, expected) {
            (Ok(found), Ok(expected)) => differ(&found, &expected, bound),
            (Err(error), _) | (_, Err(error)) => (f64::INFINITY, Some(error.to_string())),
        };
        let (operation, case) = (case.operation(), case.name());
        self.all.push(Finding { operation, case, bound, error, failure });
    }
}

/// Relative error, and what is wrong where it is beyond the bound.
fn differ(found: &[f32], expected: &[f32], bound: Bound) -> (f64, Option<String>) {
    if found.len() != expected.len() {
        let failure = format!("{} values where {} are expected", found.len(), expected.len());
        return (f64::INFINITY, Some(failure));
    }
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let pairs = || found.iter().zip(expected).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let (difference, norm) = (square(&mut pairs().map(|(a, b)| a - b)), square(&mut pairs().map(|(_, b)| b)));
    let error = if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() };
    let first = |wrong: &dyn Fn(f32, f32) -> bool| {
        let at = found.iter().zip(expected).position(|(a, b)| wrong(*a, *b))?;
        Some(format!("value {at}: {:e} where {:e} is expected", found[at], expected[at]))
    };
    match bound {
        Bound::Bits => {
            let failure = first(&|a, b| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()));
            (if error.is_nan() { f64::INFINITY } else { error }, failure)
        }
        Bound::Relative(limit) if error <= limit => (error, None),
        Bound::Relative(limit) => {
            let far = limit * (norm / expected.len() as f64).sqrt();
            let wrong = |a: f32, b: f32| !f64::from(a - b).abs().total_cmp(&far).is_le();
            let failure = first(&wrong).unwrap_or_else(|| "small differences everywhere".to_owned());
            (if error.is_nan() { f64::INFINITY } else { error }, Some(failure))
        }
    }
}

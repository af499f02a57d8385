//! Exit codes: 0 good; 1 a verdict failed or a result is invalid; 2 this input or command can never work;
//! 3 interrupted or out of resources, the same command again goes on.

use std::process::ExitCode;

use ctq_container::ErrorKind;
use ctq_kernels::KernelError;

/// How a command that ran to its end came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    Good,
    Failed,
    Unusable,
    Unfinished,
}

impl Verdict {
    /// The verdict of an exit code; of one that is none of ours, that nothing is known.
    pub(crate) fn of_number(number: u8) -> Verdict {
        let all = [Verdict::Good, Verdict::Failed, Verdict::Unusable];
        all.into_iter().find(|verdict| code_number(*verdict) == number).unwrap_or(Verdict::Unfinished)
    }
}

/// The exit code of a verdict.
pub(crate) fn code_number(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Good => 0,
        Verdict::Failed => 1,
        Verdict::Unusable => 2,
        Verdict::Unfinished => 3,
    }
}

impl From<Verdict> for ExitCode {
    fn from(verdict: Verdict) -> ExitCode {
        ExitCode::from(code_number(verdict))
    }
}

/// The verdict that an error amounts to.
pub(crate) fn verdict_of(error: &anyhow::Error) -> Verdict {
    let mut verdict = Verdict::Unusable;
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<ctq_runtime::Error>() {
            match error {
                ctq_runtime::Error::NonFinite { .. } => verdict = Verdict::Failed,
                ctq_runtime::Error::Interrupted
                | ctq_runtime::Error::Snapshot { .. }
                | ctq_runtime::Error::TooSmall(_)
                | ctq_runtime::Error::NoRoom { .. } => {
                    verdict = Verdict::Unfinished;
                }
                _ => {}
            }
        }
        if let Some(KernelError::OutOfMemory { .. } | KernelError::Device { .. } | KernelError::Lost { .. }) =
            cause.downcast_ref()
        {
            verdict = Verdict::Unfinished;
        }
        if cause.downcast_ref().is_some_and(ctq_cluster::Error::may_pass) {
            verdict = Verdict::Unfinished;
        }
        if let Some(error) = cause.downcast_ref::<ctq_eval::Error>() {
            if error.is_invalid_result() {
                verdict = Verdict::Failed;
            } else if error.is_out_of_resources() {
                verdict = Verdict::Unfinished;
            }
        }
        let kind = cause
            .downcast_ref::<ctq_convert::Error>()
            .map(ctq_convert::Error::kind)
            .or_else(|| cause.downcast_ref::<ctq_container::Error>().map(ctq_container::Error::kind));
        match kind {
            Some(ErrorKind::Interrupted | ErrorKind::Resource) => verdict = Verdict::Unfinished,
            Some(ErrorKind::Input) | None => {}
        }
        if let Some(ctq_verify::Error::Interrupted) = cause.downcast_ref::<ctq_verify::Error>() {
            verdict = Verdict::Unfinished;
        }
        if let Some(error) = cause.downcast_ref::<std::io::Error>()
            && out_of_resources(error)
        {
            verdict = Verdict::Unfinished;
        }
    }
    verdict
}

/// Disk full, quota or file size limit, memory.
fn out_of_resources(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as K;
    matches!(
        error.kind(),
        K::StorageFull | K::QuotaExceeded | K::FileTooLarge | K::OutOfMemory | K::WriteZero
    )
}

pub(crate) fn code_of(error: &anyhow::Error) -> ExitCode {
    verdict_of(error).into()
}

/// For errors before there is a report.
#[expect(clippy::print_stderr, reason = "there is no report to tell it to")]
pub(crate) fn failure(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    code_of(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_full_or_fails_is_out_of_resources() {
        let of = |error: ctq_runtime::Error| verdict_of(&anyhow::Error::from(error).context("model"));
        let device = || "cuda:0".to_owned();
        let full = || KernelError::OutOfMemory { device: device(), wanted: 1 };
        let failed = KernelError::Device { device: device(), what: "a copy failed".to_owned() };
        assert_eq!(of(full().into()), Verdict::Unfinished);
        assert_eq!(of(failed.into()), Verdict::Unfinished);
        let module = "model.layers.0.mlp.down_proj".to_owned();
        assert_eq!(of(ctq_runtime::Error::Kernel { module, source: full() }), Verdict::Unfinished);
        let no_room = ctq_runtime::Error::NoRoom { device: device(), wanted: 1, needed: 2 };
        assert_eq!(of(no_room), Verdict::Unfinished);
    }

    #[test]
    fn a_product_that_is_not_defined_never_will_be() {
        let weight = (ctq_model::matrix::Code::Bf16, ctq_model::matrix::Formula::Dense);
        let activation = ctq_model::scheme::Activation {
            code: ctq_model::matrix::Code::E4m3,
            symmetric: true,
            sharing: ctq_model::scheme::ActivationSharing::Token,
            scale: ctq_model::scheme::ActivationScale::Dynamic,
        };
        let module = "model.layers.0.mlp.down_proj".to_owned();
        let source = KernelError::NoExactProduct { weight, activation };
        let error = ctq_runtime::Error::Kernel { module, source };
        assert_eq!(verdict_of(&error.into()), Verdict::Unusable);
    }
}

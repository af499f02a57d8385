//! `ctq restore`: a container back into the checkpoint it was made from.

use ctq_container::Container;

use crate::args::RestoreOptions;
use crate::exit::Verdict;
use crate::report::{self, Report};

pub(crate) fn run(options: &RestoreOptions, report: &Report) -> anyhow::Result<Verdict> {
    let container = Container::open(&options.input)?;
    let restored = ctq_convert::restore(&container, &options.output)?;
    report::result(&format!(
        "{}: {} tensors, {:.1} MB, every one with the hash of the original",
        options.output.display(),
        restored.tensors,
        restored.bytes as f64 / 1e6
    ))?;
    if !restored.left_out.is_empty() {
        report.warning(&format!(
            "{} tensors of the original are not in the container and did not come back: {}",
            restored.left_out.len(),
            restored.left_out.join(", ")
        ));
    }
    Ok(Verdict::Good)
}

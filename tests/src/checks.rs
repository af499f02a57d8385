//! What every checkpoint with an oracle must pass, converted and on the fly, in every mode of activations.

use ctq_container::LayerSource;
use ctq_kernels::Compute;
use ctq_runtime::Acts;

use crate::compare::{mean_divergence, nll, relative, same_bits};
use crate::models::{logits, settings};
use crate::oracle::Oracle;

/// Most that the logits of `kernel` may diverge from those of `library`, in nats, where nobody else computed them.
///
/// The two are the same scheme in different arithmetic: int8 divides by amax / 127 instead of amax / 127.5, weights are
/// not rounded to bf16. Each moves activations across rounding boundaries here and there, which on these small random
/// models is worth 1e-3 to 2e-2; a wrong scale or a wrong code is worth nats.
const KERNEL: f64 = 5e-2;

/// Most that `kernel` may be, in mean next-token nll, from what transformers computes with weights that are not rounded
/// to bf16, as a share of how far `library` is from it. That is `--acts kernel` in other words wherever codes are those
/// of the library, which is everywhere but in int8. NVFP4 has a share of 1e-6; fp8 has activations near rounding
/// boundaries, of which each that falls to the other side disturbs all later positions of its window.
const SHARE: f64 = 1.0 / 3.0;

/// Everything that is wrong with the runs of a checkpoint that two sources hand out, `container` and `on_the_fly`.
pub fn complaints(oracle: &Oracle, container: &dyn LayerSource, on_the_fly: &dyn LayerSource) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut run = |acts: Acts, compute: Compute| {
        let settings = settings(acts, compute);
        let one = |source: &dyn LayerSource| {
            logits(source, &oracle.rows, settings)
                .unwrap_or_else(|error| panic!("{} {acts} {compute}: {error}", oracle.name))
        };
        let (packed, tiled) = (one(container), one(on_the_fly));
        if !same_bits(&packed, &tiled) {
            complaints.push(format!("{} {acts} {compute}: other bits from the container", oracle.name));
        }
        packed
    };
    let off = run(Acts::Off, Compute::F32);
    let library = run(Acts::Library, Compute::F32);
    let kernel = run(Acts::Kernel, Compute::F32);
    let bf16 = run(Acts::Off, Compute::Bf16);
    complaints.extend(oracle.off_complaint(&off));
    complaints.extend(oracle.library_complaint(&library));
    complaints.extend(kernel_complaint(oracle, &off, &library, &kernel));
    complaints.extend(bf16_complaint(oracle, &bf16));
    complaints
}

fn kernel_complaint(oracle: &Oracle, off: &[f32], library: &[f32], kernel: &[f32]) -> Option<String> {
    let name = &oracle.name;
    if !oracle.quantizes_activations() {
        let same = same_bits(kernel, off) && same_bits(library, off);
        return (!same).then(|| format!("{name}: acts make a difference with nothing to quantize"));
    }
    if kernel.iter().any(|logit| !logit.is_finite()) {
        return Some(format!("{name}: kernel logits are not finite"));
    }
    if let Some(exact) = oracle.exact_nll.as_ref().filter(|_| !oracle.unsettled()) {
        let distance = |logits: &[f32]| -> f64 {
            let found = nll(logits, &oracle.rows, oracle.vocabulary);
            found.iter().zip(exact).map(|(found, exact)| (found - exact).abs()).sum::<f64>()
                / found.len() as f64
        };
        let (kernel, library) = (distance(kernel), distance(library));
        let fits = kernel <= SHARE * library;
        return (!fits).then(|| {
            format!("{name}: kernel is {kernel:.1e} from unrounded weights, and library {library:.1e}")
        });
    }
    let divergence = mean_divergence(kernel, library, oracle.vocabulary);
    (divergence > KERNEL || divergence.is_nan())
        .then(|| format!("{name}: kernel diverges from library by {divergence:.1e}, at most {KERNEL:.1e}"))
}

/// Operands rounded to bf16 have errors of one part in 512; random models of two layers grow them a few times, and a
/// router may send a token elsewhere.
fn bf16_complaint(oracle: &Oracle, logits: &[f32]) -> Option<String> {
    let distance = relative(logits, &oracle.weight_only);
    // Too close is as wrong as too far: then nothing was rounded.
    (!(1e-4..8e-2).contains(&distance))
        .then(|| format!("{}: bf16 is {distance:.1e} from the f32 oracle", oracle.name))
}

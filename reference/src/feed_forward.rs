//! The feed-forward part of a block: one gated projection, or a router and its experts, in f64.
//!
//! Source: `LlamaMLP`, `MixtralSparseMoeBlock` and `Qwen3MoeSparseMoeBlock` of transformers. An expert sees the rows of
//! the window that were routed to it and no others, so a scale that is shared by a whole tensor is shared by those.

use ctq_model::spec::{FfnSpec, GatedSpec};
use ndarray::{Array2, ArrayView1, Axis, Zip};

use crate::Result;
use crate::reference::{Acts, Reference};

impl Reference<'_> {
    /// The feed-forward part over normalised hidden states [tokens, hidden], without the residual.
    pub(crate) fn feed_forward(&self, ffn: &FfnSpec, x: &Array2<f64>, acts: Acts) -> Result<Array2<f64>> {
        match ffn {
            FfnSpec::Gated(gated) => self.gated(gated, x, acts),
            FfnSpec::Moe { router, top_k, renormalize, experts } => {
                let logits = self.linear(router, x, acts)?;
                let routes: Vec<Vec<Route>> =
                    logits.rows().into_iter().map(|row| choose(row, *top_k)).collect();
                let routes =
                    if *renormalize { routes.into_iter().map(renormalized).collect() } else { routes };
                self.experts(experts, &routes, x, acts)
            }
        }
    }

    /// `down(silu(gate(x)) * up(x))`.
    fn gated(&self, gated: &GatedSpec, x: &Array2<f64>, acts: Acts) -> Result<Array2<f64>> {
        let mut inner = self.linear(&gated.gate, x, acts)?;
        let up = self.linear(&gated.up, x, acts)?;
        Zip::from(&mut inner).and(&up).for_each(|gate, up| *gate = silu(*gate) * up);
        self.linear(&gated.down, &inner, acts)
    }

    /// The weighted sum of each token's experts, in ascending order of the experts.
    fn experts(
        &self,
        experts: &[GatedSpec],
        routes: &[Vec<Route>],
        x: &Array2<f64>,
        acts: Acts,
    ) -> Result<Array2<f64>> {
        let mut sum = Array2::zeros(x.dim());
        for (index, expert) in experts.iter().enumerate() {
            let routed: Vec<(usize, f64)> = routes
                .iter()
                .enumerate()
                .flat_map(|(token, routes)| routes.iter().map(move |route| (token, route)))
                .filter(|(_, route)| route.expert == index)
                .map(|(token, route)| (token, route.weight))
                .collect();
            if routed.is_empty() {
                continue;
            }
            let tokens: Vec<usize> = routed.iter().map(|(token, _)| *token).collect();
            let y = self.gated(expert, &x.select(Axis(0), &tokens), acts)?;
            for ((token, weight), y) in routed.into_iter().zip(y.rows()) {
                sum.row_mut(token).scaled_add(weight, &y);
            }
        }
        Ok(sum)
    }
}

/// One expert of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Route {
    expert: usize,
    weight: f64,
}

/// The `top_k` experts of largest probability; of equal ones, those of lower index.
fn choose(logits: ArrayView1<'_, f64>, top_k: usize) -> Vec<Route> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let raised: Vec<f64> = logits.iter().map(|logit| libm::exp(logit - largest)).collect();
    let sum: f64 = raised.iter().sum();
    let mut routes: Vec<Route> =
        raised.iter().enumerate().map(|(expert, raised)| Route { expert, weight: raised / sum }).collect();
    // A stable sort keeps equal ones in the order of their index.
    routes.sort_by(|a, b| b.weight.total_cmp(&a.weight));
    routes.truncate(top_k);
    routes
}

/// The weights of one token divided by their sum.
fn renormalized(routes: Vec<Route>) -> Vec<Route> {
    let sum: f64 = routes.iter().map(|route| route.weight).sum();
    routes.into_iter().map(|route| Route { weight: route.weight / sum, ..route }).collect()
}

/// `x * sigmoid(x)`.
fn silu(x: f64) -> f64 {
    x / (1.0 + libm::exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn equal_probabilities_choose_the_lower_index() {
        let routes = choose(array![1.0, 3.0, 3.0, 3.0].view(), 2);
        assert_eq!(routes.iter().map(|route| route.expert).collect::<Vec<_>>(), [1, 2]);
        let routes = renormalized(routes);
        assert_eq!(routes[0].weight, 0.5);
    }

    #[test]
    fn silu_has_no_trouble_far_out() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(-1000.0), 0.0);
        assert_eq!(silu(1000.0), 1000.0);
    }
}

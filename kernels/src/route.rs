//! Which experts a token goes to, and with what weight: the definition that every backend gives the bits of.

/// What the weights of the chosen experts are divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renormalize {
    /// The sum over the chosen experts: their weights add up to one.
    Chosen,
    /// The sum over all experts: the weights of the softmax as they are.
    All,
}

/// Tokens of one expert, ascending, with their weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertTokens {
    /// Rows of the tokens, ascending.
    pub rows: Vec<u32>,
    /// Weight of the expert for each of them.
    pub weights: Vec<f32>,
}

/// Softmax over all experts in f64, the `top_k` largest (the lower index of equals), divided as `renormalize` says
/// (`MixtralSparseMoeBlock`, `Qwen3MoeSparseMoeBlock`). `logits` is [tokens, experts].
pub(crate) fn route(
    logits: &[f32],
    experts: usize,
    top_k: usize,
    renormalize: Renormalize,
) -> Vec<ExpertTokens> {
    let mut tokens = vec![ExpertTokens::default(); experts];
    for (row, logits) in logits.chunks_exact(experts).enumerate() {
        let largest = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let powers: Vec<f64> = logits.iter().map(|logit| libm::exp(f64::from(logit - largest))).collect();
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        order.truncate(top_k);
        let divisor: f64 = match renormalize {
            Renormalize::Chosen => order.iter().map(|expert| powers[*expert]).sum(),
            Renormalize::All => powers.iter().sum(),
        };
        for expert in order {
            tokens[expert].rows.push(row as u32);
            tokens[expert].weights.push((powers[expert] / divisor) as f32);
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_chosen_and_ties_go_to_the_lower_index() {
        let tokens = route(&[0.0, 1.0, 1.0, 1.0], 4, 2, Renormalize::Chosen);
        assert_eq!(tokens[0], ExpertTokens::default());
        assert_eq!(
            (tokens[1].rows.as_slice(), tokens[1].weights.as_slice()),
            ([0].as_slice(), [0.5].as_slice())
        );
        assert_eq!(tokens[2], tokens[1]);
        assert_eq!(tokens[3], ExpertTokens::default());
    }

    #[test]
    fn without_renormalization_the_weights_are_those_of_the_whole_softmax() {
        // softmax(ln 1, ln 3, ln 4) = 1/8, 3/8, 4/8.
        let logits = [0.0, 3.0_f32.ln(), 4.0_f32.ln()];
        let tokens = route(&logits, 3, 1, Renormalize::All);
        assert!((tokens[2].weights[0] - 0.5).abs() < 1e-7);
        let tokens = route(&logits, 3, 2, Renormalize::Chosen);
        assert!((tokens[1].weights[0] - 3.0 / 7.0).abs() < 1e-7);
    }
}

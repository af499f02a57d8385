//! Which quantization a module's activations get, with the scales that the checkpoint stores for it.
//!
//! Knows tensor names and schemes; the arithmetic is in [`crate::quantize`].

use ctq_model::inventory::{KvScheme, Linear};
use ctq_model::scheme::{Activation, ActivationScale};
use ctq_model::spec::AttentionSpec;
use ctq_model::{Error as ModelError, TensorSource};
use ndarray::Array2;

use crate::quantize::{Quantizer, ScaleSource, TokenShape};
use crate::stored;
use crate::{Error, Result};

/// The two ends of a linear.
#[derive(Clone, Copy)]
pub(crate) enum Side {
    Input,
    Output,
}

/// What attention reads.
#[derive(Clone, Copy)]
pub(crate) enum Role {
    Query,
    Key,
    Value,
}

/// Quantization of the inputs or outputs of a linear; `None` where its scheme has none.
///
/// # Errors
/// Where a stored scale is missing or of another shape or dtype.
pub(crate) fn of_linear(source: &dyn TensorSource, linear: &Linear, side: Side) -> Result<Option<Quantizer>> {
    let (activation, name, width) = match side {
        Side::Input => (linear.scheme.input, "input", linear.k),
        Side::Output => (linear.scheme.output, "output", linear.n),
    };
    let Some(activation) = activation else { return Ok(None) };
    let tensor = |leaf: &str| format!("{}.{name}_{leaf}", linear.module);
    let scale = match activation.scale {
        ActivationScale::Static => ScaleSource::Static {
            scales: stored::floats(source, &tensor("scale"), 1)?,
            zeros: static_zeros(source, &activation, &tensor("zero_point"), 1)?,
        },
        ActivationScale::Dynamic => ScaleSource::Dynamic,
        ActivationScale::Local => {
            ScaleSource::Local { global: stored::floats(source, &tensor("global_scale"), 1)?[0] }
        }
        ActivationScale::PowerOfTwo => ScaleSource::PowerOfTwo,
    };
    Quantizer::new(&linear.module, &activation, scale, TokenShape { width, heads: 1 }).map(Some)
}

/// Quantization of keys, values or queries after rotation (spec 3.6); `None` where the scheme leaves them alone.
///
/// # Errors
/// Where a stored scale is missing or of another shape or dtype, and where the scheme has no meaning here.
pub(crate) fn of_attention(
    source: &dyn TensorSource,
    attention: &AttentionSpec,
    scheme: &KvScheme,
    role: Role,
) -> Result<Option<Quantizer>> {
    let (stored_scale, zero, heads) = match role {
        Role::Query if !scheme.queries => return Ok(None),
        Role::Query => (&scheme.q_scale, "q_zero_point", attention.heads),
        Role::Key => (&scheme.k_scale, "k_zero_point", attention.kv_heads),
        Role::Value => (&scheme.v_scale, "v_zero_point", attention.kv_heads),
    };
    let zero = format!("{}.{zero}", attention.module);
    let scale = match (scheme.activation.scale, stored_scale) {
        (ActivationScale::Static, Some(name)) => {
            let count = elements(source, name)?;
            ScaleSource::Static {
                scales: stored::floats(source, name, count)?,
                zeros: static_zeros(source, &scheme.activation, &zero, count)?,
            }
        }
        (ActivationScale::Dynamic, _) => ScaleSource::Dynamic,
        (ActivationScale::Static, None) | (ActivationScale::Local | ActivationScale::PowerOfTwo, _) => {
            let what = format!("keys and values cannot be quantized as {}", scheme.activation);
            return Err(Error::Activation { module: attention.module.clone(), what });
        }
    };
    let shape = TokenShape { width: heads * attention.head_dim, heads };
    Quantizer::new(&attention.module, &scheme.activation, scale, shape).map(Some)
}

/// An f64 matrix through an f32 quantizer: the activation is rounded to f32 first (xd is f32).
pub(crate) fn quantized(quantizer: &Quantizer, x: &Array2<f64>) -> Array2<f64> {
    let mut x = x.mapv(|value| value as f32);
    quantizer.apply(&mut x);
    x.mapv(f64::from)
}

fn static_zeros(
    source: &dyn TensorSource,
    activation: &Activation,
    name: &str,
    count: usize,
) -> Result<Option<Vec<f32>>> {
    if activation.symmetric {
        return Ok(None);
    }
    let zeros = stored::signed_bytes(source, name, count)?;
    Ok(Some(zeros.into_iter().map(f32::from).collect()))
}

fn elements(source: &dyn TensorSource, name: &str) -> Result<usize> {
    let info = source
        .info(name)
        .ok_or_else(|| ModelError::missing(source.root(), name, "the kv cache scheme is static"))?;
    Ok(info.shape.iter().product())
}

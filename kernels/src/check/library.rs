//! What a device's library for dense products does with shapes, found out rather than judged: whether an output's bits
//! depend on how many rows of the matrix or of the input go together.

use crate::KernelError;
use crate::cuda::{Cuda, DenseProduct, Device, Store};
use crate::random::Random;

/// Something found out about a device that is neither right nor wrong.
#[derive(Clone, Debug)]
pub struct Observation {
    /// What was looked at.
    pub name: String,
    /// What was seen.
    pub detail: String,
}

const M: usize = 2048;
const N: usize = 4096;
const K: usize = 4096;

/// Compares the bits of one product with those of its pieces.
///
/// # Errors
/// Where the device fails.
pub fn observe_library<D: Device>(cuda: &Cuda<D>) -> Result<Vec<Observation>, KernelError> {
    let device = cuda.device();
    if !device.has_dense_product(K) {
        let detail = "there is none: ctq's own kernels multiply".to_owned();
        return Ok(vec![Observation { name: "library of dense products".to_owned(), detail }]);
    }
    let mut random = Random::new(8);
    let x = device.upload(&halves(M * K, &mut random))?;
    let weight = device.upload(&halves(N * K, &mut random))?;
    let product = |m: usize, n: usize| {
        let y = device.allocate(M * N * 4)?;
        for row in (0..M).step_by(m) {
            for column in (0..N).step_by(n) {
                device.dense_product(&DenseProduct {
                    weight: D::address(&weight).offset(column * K * 2),
                    x: D::address(&x).offset(row * K * 2),
                    y: D::address(&y).offset((row * N + column) * 4),
                    m,
                    n,
                    k: K,
                    y_stride: N,
                    store: Store::Over,
                })?;
            }
        }
        let mut bytes = vec![0; M * N * 4];
        device.download(&y, 0, &mut bytes)?;
        Ok::<_, KernelError>(bytes)
    };
    let whole = product(M, N)?;
    let pieces = [
        ("rows of the matrix", M, N / 2),
        ("rows of the matrix", M, N / 4),
        ("rows of the matrix", M, N / 8),
    ];
    let pieces = pieces.into_iter().chain([("rows of the input", M / 2, N), ("rows of the input", M / 8, N)]);
    let observe = |(what, m, n): (&str, usize, usize)| {
        let name = format!("library, {what} {} at a time", if m == M { n } else { m });
        // A shape that the library refuses is an answer too.
        let detail = match product(m, n) {
            Ok(found) if found == whole => "the bits of the whole".to_owned(),
            Ok(found) => {
                let pairs = found.chunks_exact(4).zip(whole.chunks_exact(4));
                format!("{} of {} outputs differ", pairs.filter(|(a, b)| a != b).count(), M * N)
            }
            Err(error) => format!("refused: {error}"),
        };
        Observation { name, detail }
    };
    Ok(pieces.map(observe).collect())
}

/// Random bf16 numbers.
fn halves(count: usize, random: &mut Random) -> Vec<u8> {
    (0..count).flat_map(|_| half::bf16::from_f32(random.float()).to_le_bytes()).collect()
}

//! Activations of several processes side by side, by way of the host: for devices that share nothing better.

use ctq_kernels::collective::{Collective, Peers};
use ctq_kernels::{Backend, KernelError};

use crate::pipe::to_bytes;

/// Ranks that put activations side by side in host memory, which takes the bytes of the whole about three times.
#[derive(Clone, Debug)]
pub struct OverHost<P> {
    peers: P,
}

impl<P: Peers> OverHost<P> {
    /// By way of these peers.
    pub fn new(peers: P) -> OverHost<P> {
        OverHost { peers }
    }
}

impl<P: Peers> Peers for OverHost<P> {
    fn rank(&self) -> usize {
        self.peers.rank()
    }

    fn ranks(&self) -> usize {
        self.peers.ranks()
    }

    fn exchange(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, KernelError> {
        self.peers.exchange(parts)
    }

    fn abort(&self, reason: &str) {
        self.peers.abort(reason);
    }
}

impl<P: Peers, B: Backend> Collective<B> for OverHost<P> {
    fn all_gather(&self, backend: &B, part: B::Buffer, widths: &[usize]) -> Result<B::Buffer, KernelError> {
        let bytes = to_bytes(&backend.download(&part)?);
        drop(part);
        let mut parts = vec![bytes; 1];
        parts.resize_with(self.ranks(), Vec::new);
        for rank in 1..parts.len() {
            parts[rank] = parts[0].clone();
        }
        let all = self.peers.exchange(parts)?;
        let (width, values) = side_by_side(&all, widths)?;
        drop(all);
        backend.upload(width, &values)
    }
}

/// Columns of all parts, [rows, widths\[i\]] each as bytes, in the order of ranks: their width, and [rows, width].
fn side_by_side(parts: &[Vec<u8>], widths: &[usize]) -> Result<(usize, Vec<f32>), KernelError> {
    let total: usize = widths.iter().sum();
    let rows =
        parts.iter().zip(widths).find_map(|(part, width)| (part.len() / 4).checked_div(*width)).unwrap_or(0);
    let mut values = vec![0.0; rows * total];
    let mut first = 0;
    for (rank, (part, width)) in parts.iter().zip(widths.iter().copied()).enumerate() {
        let elements = part.as_chunks::<4>().0;
        if part.len() != rows * width * 4 {
            let what = format!(
                "rank {rank} of its group hands over {} bytes of activations, where {rows} rows of {width} are expected; start all ranks with the same command",
                part.len()
            );
            return Err(KernelError::Lost { what });
        }
        if width > 0 {
            for (row, to) in elements.chunks_exact(width).zip(values.chunks_exact_mut(total)) {
                for (to, from) in to[first..first + width].iter_mut().zip(row) {
                    *to = f32::from_le_bytes(*from);
                }
            }
        }
        first += width;
    }
    Ok((total, values))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_ranks_with_and_without_some() {
        let parts = [to_bytes(&[1.0, 2.0, 5.0, 6.0]), Vec::new(), to_bytes(&[3.0, 7.0])];
        assert_eq!(
            side_by_side(&parts, &[2, 0, 1]).expect("2 rows"),
            (3, vec![1.0, 2.0, 3.0, 5.0, 6.0, 7.0])
        );
        assert_eq!(side_by_side(&[Vec::new(), Vec::new()], &[0, 4]).expect("no rows"), (4, Vec::new()));
    }

    #[test]
    fn ranks_that_disagree_on_rows_are_not_put_side_by_side() {
        let parts = [to_bytes(&[1.0, 2.0]), to_bytes(&[3.0])];
        assert!(side_by_side(&parts, &[1, 1]).is_err());
    }
}

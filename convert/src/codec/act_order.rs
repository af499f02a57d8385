//! Act-order: `weight_g_idx` says the group of each column. Columns are brought into an order in which groups are
//! consecutive, by a stable sort; the order is kept, so inputs can be permuted alike and the original restored.

use ctq_model::Result;
use ctq_model::matrix::Sharing;

use super::Module;

const LEAF: &str = "weight_g_idx";

/// The order of columns: column `j` of the sorted matrix is input `permutation[j]`. `None` where they are in order.
pub(super) fn read(module: &Module<'_>) -> Result<Option<Vec<u32>>> {
    let linear = module.linear;
    if !linear.scheme.act_order {
        return Ok(None);
    }
    let tensor = module.tensor(LEAF, linear.k * 4)?;
    let groups: Vec<i32> =
        tensor.bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let mut permutation: Vec<u32> = (0..linear.k as u32).collect();
    permutation.sort_by_key(|column| groups[*column as usize]);
    let Sharing::Group { size } = linear.scheme.sharing else {
        return Err(module.bad(LEAF, "orders columns by group, and the scheme has no groups"));
    };
    if restore(Some(&permutation), size, linear.k) != *tensor.bytes {
        return Err(module.bad(LEAF, format!("does not give every group exactly {size} columns")));
    }
    let in_order = permutation.is_sorted();
    Ok((!in_order).then_some(permutation))
}

/// The bytes of `weight_g_idx`: the group of each column in its original place.
pub(super) fn restore(permutation: Option<&[u32]>, size: usize, k: usize) -> Vec<u8> {
    let mut stored = vec![0; k * 4];
    for sorted in 0..k {
        let column = permutation.map_or(sorted, |permutation| permutation[sorted] as usize);
        stored[column * 4..column * 4 + 4].copy_from_slice(&((sorted / size) as i32).to_le_bytes());
    }
    stored
}

/// One row into sorted order: `out[j] = row[permutation[j]]`.
pub(super) fn gather(permutation: &[u32], width: usize, row: &[u8], out: &mut [u8]) {
    for (out, column) in out.chunks_exact_mut(width).zip(permutation) {
        out.copy_from_slice(&row[*column as usize * width..][..width]);
    }
}

/// The inverse of [`gather`]: `out[permutation[j]] = row[j]`.
pub(super) fn scatter(permutation: &[u32], width: usize, row: &[u8], out: &mut [u8]) {
    for (code, column) in row.chunks_exact(width).zip(permutation) {
        out[*column as usize * width..][..width].copy_from_slice(code);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn scatter_undoes_gather(permutation in Just((0..40_u32).collect::<Vec<_>>()).prop_shuffle(), width in 1..3_usize) {
            let row: Vec<u8> = (0..(40 * width) as u8).collect();
            let (mut sorted, mut again) = (vec![0; row.len()], vec![0; row.len()]);
            gather(&permutation, width, &row, &mut sorted);
            scatter(&permutation, width, &sorted, &mut again);
            prop_assert_eq!(again, row);
        }
    }
}

//! Activations over the host, held against the backend's own `concatenate`.

use ctq_cluster::OverHost;
use ctq_kernels::Backend;
use ctq_kernels::collective::Collective;
use ctq_kernels::cpu::Cpu;

use crate::{all, worlds};

#[test]
fn columns_over_the_host_are_those_of_concatenate() {
    let worlds = worlds(3);
    let backend = Cpu::detect();
    for (rows, widths) in [(5, [16, 48, 32]), (1, [16, 0, 16]), (4, [0, 0, 64]), (7, [1, 2, 3])] {
        let values = |rank: usize| -> Vec<f32> {
            (0..rows * widths[rank]).map(|index| (index * 3 + rank) as f32 * -0.37).collect()
        };
        let buffer = |rank: usize| backend.upload(widths[rank], &values(rank)).expect("the CPU has room");
        let gathered = all(&worlds, |world| {
            let collective = OverHost::new(world.group(&[0, 1, 2], 1));
            let all = collective.all_gather(&backend, buffer(world.rank()), &widths).expect("all are there");
            backend.download(&all).expect("the CPU has it")
        });
        // The CPU has no rows where there are no columns.
        let parts: Vec<_> = (0..3).filter(|rank| widths[*rank] > 0).map(buffer).collect();
        let whole = backend.concatenate(&parts.iter().collect::<Vec<_>>()).expect("the CPU has room");
        let whole = backend.download(&whole).expect("the CPU has it");
        assert!(whole.len() == rows * widths.iter().sum::<usize>());
        for gathered in gathered {
            assert_eq!(gathered, whole, "{rows} rows of {widths:?}");
        }
    }
}

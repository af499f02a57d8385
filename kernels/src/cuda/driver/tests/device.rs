//! A device through the driver, where this machine has one that can be used; otherwise these tests say so and pass.
#![expect(clippy::print_stdout, reason = "says what a test found, or why it is skipped")]

use std::thread;

use super::*;
use crate::cuda::device::Store;
use crate::cuda::driver::probe;
use bytemuck::NoUninit;

fn open(budget: Option<u64>) -> Option<CudaDevice> {
    match probe() {
        Ok(machine) => {
            let ordinal = machine.usable()[0];
            let device = CudaDevice::open(&machine, ordinal, budget, None).expect("a device that opens");
            println!("{}: {:?}", device.context.name, device.dense());
            Some(device)
        }
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

/// `PairArgs` of elementwise.cu.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct PairArgs {
    x: Address,
    y: Address,
    count: u64,
}

// SAFETY: as the structure of that name.
unsafe impl Arguments for PairArgs {}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn floats(device: &CudaDevice, memory: &CudaMemory, count: usize) -> Vec<f32> {
    let mut bytes = vec![0; count * 4];
    device.download(memory, 0, &mut bytes).expect("downloaded");
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

fn add(device: &CudaDevice, queue: Queue, x: &CudaMemory, y: &CudaMemory, count: usize) {
    let args = PairArgs { x: CudaDevice::address(x), y: CudaDevice::address(y), count: count as u64 };
    device.launch(queue, "add", [count.div_ceil(256), 1, 1], &args).expect("launched");
}

#[test]
fn bytes_come_back_whatever_their_number() {
    let Some(device) = open(None) else { return };
    for count in [0, 1, 255, SMALL, SMALL + 1, (64 << 20) + 12_345, 97 << 20] {
        let sent: Vec<u8> = (0..count).map(|i| (i ^ (i >> 8) ^ (i >> 20)) as u8).collect();
        let memory = device.upload(&sent).expect("uploaded");
        assert!(CudaDevice::address(&memory).0.is_multiple_of(256));
        let mut received = vec![0; count];
        device.download(&memory, 0, &mut received).expect("downloaded");
        assert!(sent == received, "{count} bytes");
        let (offset, some) = (count / 3, count / 2);
        device.download(&memory, offset, &mut received[..some]).expect("downloaded");
        assert!(sent[offset..offset + some] == received[..some], "{some} of {count} bytes");
        assert!(device.download(&memory, count, &mut [0]).is_err());
    }
}

#[test]
fn queues_follow_one_another() {
    let Some(device) = open(None) else { return };
    let ones = vec![1.0_f32; 1 << 20];
    let x = device.upload(&bytes(&ones)).expect("uploaded");
    for _ in 0..10 {
        // A table that only its own drop ends, as soon as the work is queued.
        for queue in [Queue::Compute, Queue::Decode] {
            let table = device.upload(&bytes(&ones[..1000])).expect("uploaded");
            add(&device, queue, &x, &table, 1000);
            let other = if queue == Queue::Compute { Queue::Decode } else { Queue::Compute };
            device.follow(other, queue).expect("it follows");
        }
    }
    let sums = floats(&device, &x, ones.len());
    assert!(sums[..1000].iter().all(|sum| *sum == 21.0), "{:?}", &sums[..4]);
    assert!(sums[1000..].iter().all(|sum| *sum == 1.0));
}

#[test]
fn another_thread_may_upload_meanwhile() {
    let Some(device) = open(None) else { return };
    let x = device.upload(&bytes(&[0.0; 1000])).expect("uploaded");
    thread::scope(|scope| {
        let uploads = || {
            (0..20).for_each(|n: usize| {
                let sent = vec![n as u8; 100 + n * 700_000];
                let memory = device.upload(&sent).expect("uploaded");
                let mut received = vec![0; sent.len()];
                device.download(&memory, 0, &mut received).expect("downloaded");
                assert!(sent == received);
            });
        };
        scope.spawn(uploads);
        scope.spawn(uploads);
        for n in 0..200 {
            let y = device.upload(&bytes(&[1.0; 1000])).expect("uploaded");
            add(&device, if n % 2 == 0 { Queue::Compute } else { Queue::Decode }, &x, &y, 1000);
            let next =
                if n % 2 == 0 { [Queue::Decode, Queue::Compute] } else { [Queue::Compute, Queue::Decode] };
            device.follow(next[0], next[1]).expect("it follows");
        }
    });
    assert_eq!(floats(&device, &x, 1000), vec![200.0; 1000]);
}

#[test]
fn a_budget_is_kept_and_memory_that_was_dropped_counts_no_more() {
    let Some(device) = open(Some(10 << 20)) else { return };
    let before = device.used();
    let half = device.allocate(5 << 20).expect("half of it");
    let error = device.allocate((5 << 20) + 1).expect_err("too much");
    assert!(matches!(error, KernelError::OutOfMemory { .. }), "{error}");
    // Kept while decoding may use it, and given up when there is no other room.
    let one = device.upload(&bytes(&[1.0])).expect("uploaded");
    add(&device, Queue::Decode, &half, &one, 1);
    drop(half);
    assert!(device.used() >= before + (5 << 20));
    let most = device.allocate(9 << 20).expect("the rest");
    drop(most);
    drop(one);
    assert_eq!(device.used(), before);
}

#[test]
fn what_cannot_be_launched_is_an_error_with_its_name() {
    let Some(device) = open(None) else { return };
    let args = PairArgs { x: Address::NULL, y: Address::NULL, count: 0 };
    let error = |kernel, blocks| {
        device.launch(Queue::Compute, kernel, blocks, &args).expect_err("refused").to_string()
    };
    assert!(error("no_such_kernel", [1, 1, 1]).contains("there is no kernel `no_such_kernel`"));
    assert!(error("add", [1, 65_536, 1]).contains("`add` on 1 x 65536 x 1 blocks"));
    device.launch(Queue::Compute, "no_such_kernel", [1, 0, 1], &args).expect("nothing is launched");
}

#[test]
fn a_dense_product_is_right_and_its_bits_depend_on_neither_stride_nor_place() {
    let Some(device) = open(None) else { return };
    let (m, n, k) = (64, 96, 256);
    if !device.has_dense_product(k) {
        println!("skipped: {:?}", device.dense());
        return;
    }
    assert!(!device.has_dense_product(12));
    let bits = |seed: usize, count: usize| -> Vec<u16> {
        (0..count).map(|i| 0x3c00 | ((i * 7919 + seed) % 1021) as u16 | ((i % 3 == 0) as u16) << 15).collect()
    };
    let (x, w) = (bits(1, m * k), bits(2, n * k));
    let upload = |bits: &[u16]| {
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        device.upload(&bytes).expect("uploaded")
    };
    let (dx, dw) = (upload(&x), upload(&w));
    let wide = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
    let mut first: Option<Vec<u32>> = None;
    for (y_stride, offset) in [(n, 0), (n + 4, 4), (n + 1, 0), (n + 3, 2)] {
        let y = device.upload(&bytes(&vec![7.0; m * y_stride + offset])).expect("uploaded");
        let product = DenseProduct {
            weight: CudaDevice::address(&dw),
            x: CudaDevice::address(&dx),
            y: CudaDevice::address(&y).offset(offset * 4),
            m,
            n,
            k,
            y_stride,
            store: Store::Over,
        };
        device.dense_product(&product).expect("multiplied");
        let all = floats(&device, &y, m * y_stride + offset);
        let rows: Vec<&[f32]> = (0..m).map(|row| &all[offset + row * y_stride..][..n]).collect();
        for (row, y) in rows.iter().enumerate() {
            for (column, y) in y.iter().enumerate() {
                let terms = (0..k).map(|i| wide(x[row * k + i]) * wide(w[column * k + i]));
                let expected: f64 = terms.sum();
                assert!(
                    (f64::from(*y) - expected).abs() < 1e-5 * k as f64,
                    "{row}, {column}: {y} for {expected}"
                );
            }
        }
        let between =
            (0..m - 1).flat_map(|row| &all[offset + row * y_stride + n..offset + (row + 1) * y_stride]);
        assert!(all[..offset].iter().chain(between).all(|value| *value == 7.0), "written beside y");
        let bits: Vec<u32> = rows.concat().iter().map(|value| value.to_bits()).collect();
        assert_eq!(*first.get_or_insert_with(|| bits.clone()), bits, "stride {y_stride}");
        if device.adds_dense_products() && y_stride % 4 == 0 {
            device.dense_product(&DenseProduct { store: Store::Added, ..product }).expect("added");
            let sums = floats(&device, &y, m * y_stride + offset);
            for (sum, once) in sums.iter().zip(&all) {
                assert!(*sum == 2.0 * once || *once == 7.0, "{sum} where {once} is added to itself");
            }
        }
    }
}

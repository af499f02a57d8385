//! Products on tensor cores for fp8 against those of f16 operands, in the emulation, where a sum keeps every bit of f32.

use super::*;

/// Rows `tokens` of activations that are the same whoever asks, by the backend's own preparation, times `matrix`.
fn by_own_operand(
    cuda: &Cuda<Emulated>,
    tokens: Range<usize>,
    treatment: &Treatment,
    matrix: &TiledMatrix,
    rows: Range<usize>,
) -> Vec<f32> {
    let k = matrix.k;
    let values = Random::new(7).floats(tokens.end * k);
    let x = cuda.upload(k, &values[tokens.start * k..]).expect("activations");
    let window = 0..tokens.len();
    let x = cuda.prepare(&x, treatment, Compute::Bf16, std::slice::from_ref(&window)).expect("an operand");
    let held = CudaMatrix::upload(cuda.device(), matrix, rows).expect("a matrix");
    let y = linear(cuda, &x, &held, None, Compute::Bf16).expect("a product");
    y.download(cuda.device()).expect("values")
}

fn on_fp8_cores(schedule: Schedule) -> Cuda<Emulated> {
    let device = Emulated::new(schedule).with_warpgroups(Warpgroups::Present);
    Cuda::new(device).with_linears(Some(LinearPath::Fp8))
}

/// In the emulation, where sums of a stage keep every bit of f32.
#[test]
fn products_on_fp8_cores_are_those_of_f16_operands_and_cuts_do_not_show() {
    let fp8 = |sharing| exact(Code::E4m3, true, sharing, DYNAMIC);
    let scheme = |sharing| affine(Code::E4m3, DType::F32, sharing);
    let groups = ActivationSharing::Group { size: 128 };
    let pairs = [
        (scheme(Sharing::Channel), fp8(TOKEN), 1100),
        (scheme(Sharing::Block { rows: 128, columns: 128 }), fp8(groups), 1280),
        (affine(Code::E4m3, DType::BF16, group(256)), fp8(TOKEN), 1280),
        (scheme(Sharing::Tensor).permuted(), fp8(TOKEN), 200),
    ];
    for (index, schedule) in Schedule::ALL.into_iter().cycle().take(8).enumerate() {
        let (scheme, treatment, k) = &pairs[index % pairs.len()];
        let (m, n) = (150, 330);
        let matrix = tiled(n, *k, *scheme, index as u64);
        let run =
            |cuda: &Cuda<Emulated>, tokens, rows| by_own_operand(cuda, tokens, treatment, &matrix, rows);
        let (cuda, what) = (on_fp8_cores(schedule), format!("{scheme:?} under {schedule:?}"));
        let whole = run(&cuda, 0..m, 0..n);
        let expected: Vec<f64> = run(&first(), 0..m, 0..n).iter().map(|y| f64::from(*y)).collect();
        check_close(&whole, &expected, &what);
        for (tokens, rows) in [(0..129, 16..n), (129..m, 0..80)] {
            let found = run(&cuda, tokens.clone(), rows.clone());
            let cut: Vec<f32> =
                tokens.clone().flat_map(|token| whole[token * n..][rows.clone()].to_vec()).collect();
            same_bits(&found, &cut, &format!("{what}, tokens {tokens:?}, rows {rows:?}"));
        }
    }
}

/// Weights that fp8 cores do not take: bytes become f16 again.
#[test]
fn products_beside_fp8_cores_have_the_bits_of_f16_operands() {
    let fp8 = |sharing| exact(Code::E4m3, true, sharing, DYNAMIC);
    let pairs = [
        (affine(Code::E4m3, DType::F16, group(64)), fp8(TOKEN)),
        (affine(Code::E4m3, DType::F16, group(36)).permuted(), fp8(TOKEN)),
        (integer(4, group(32)).with_zeros().permuted(), fp8(TOKEN)),
        (integer(8, group(128)), fp8(ActivationSharing::Group { size: 32 })),
    ];
    for (seed, (scheme, treatment)) in pairs.iter().enumerate() {
        let matrix = tiled(70, 288, *scheme, seed as u64);
        let run = |cuda: &Cuda<Emulated>| by_own_operand(cuda, 0..11, treatment, &matrix, 16..70);
        same_bits(&run(&on_fp8_cores(Schedule::ALL[seed])), &run(&first()), &format!("{scheme:?}"));
    }
}

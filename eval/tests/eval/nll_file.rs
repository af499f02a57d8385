//! The file of negative log-likelihoods: read by other people's code, and written the same each time.

use ctq_eval::Error;
use ctq_eval::nll_file::NllFile;
use ctq_eval::statistics::ScoredToken;
use safetensors::{Dtype, SafeTensors};

fn example() -> NllFile {
    let token = |window, position, token, nll| ScoredToken { window, position, token, nll };
    NllFile {
        protocol_id: "1958124996563c38".into(),
        method_id: "30b85c8931364431".into(),
        preset: "exl3-2025-small".into(),
        tokens: vec![token(0, 1, 1, 0.1), token(0, 2, 2, 2.5), token(1, 1, 513, 1e-300)],
    }
}

#[test]
fn the_safetensors_crate_reads_what_is_written() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("scores.safetensors");
    example().write(&path).expect("written");
    let bytes = std::fs::read(&path).expect("bytes");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let token = tensors.tensor("token").expect("token");
    assert_eq!((token.dtype(), token.shape()), (Dtype::I64, &[3][..]));
    let tokens: Vec<u8> = [1_i64, 2, 513].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(token.data(), tokens);
    let nll = tensors.tensor("nll").expect("nll");
    assert_eq!(nll.dtype(), Dtype::F64);
    let expected: Vec<u8> = [0.1_f64, 2.5, 1e-300].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(nll.data(), expected);
    assert_eq!(NllFile::read(&path).expect("read"), example());
    let again = directory.path().join("again.safetensors");
    example().write(&again).expect("written");
    assert_eq!(std::fs::read(again).expect("bytes"), bytes);
}

#[test]
fn files_of_one_question_are_paired() {
    let mut other = example();
    for scored in &mut other.tokens {
        scored.nll += 0.25;
    }
    assert!((other.paired(&example()).expect("comparable").difference - 0.25).abs() < 1e-15);
    other.protocol_id = "0000000000000000".into();
    let message = other.paired(&example()).expect_err("another question").to_string();
    assert!(message.contains("1958124996563c38"), "{message}");
}

#[test]
fn other_files_are_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("other.safetensors");
    std::fs::write(&path, b"{}").expect("a file");
    assert!(matches!(NllFile::read(&path), Err(Error::BadNllFile { .. })));
    let empty: Vec<(&str, safetensors::tensor::TensorView<'_>)> = Vec::new();
    std::fs::write(&path, safetensors::serialize(empty, None).expect("safetensors")).expect("a file");
    let message = NllFile::read(&path).expect_err("no tensors").to_string();
    assert!(message.contains("no tensor window"), "{message}");
}

//! What the oracle refuses: each with a message that names the module or token and says what to do.

mod single_module;

use std::path::Path;

use ctq_model::Inventory;
use ctq_reference::{Acts, Reference, Result};
use ndarray::Array2;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use single_module::{MODULE, SingleModule};

/// A model with a vocabulary of 2 and a width of 3 whose head is dense f32.
fn model(head: [f32; 6]) -> SingleModule {
    let data: Vec<u8> = head.iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![2, 3], &data).expect("view");
    let file = safetensors::serialize([("weight", view)], None).expect("file");
    let stored = SafeTensors::deserialize(&file).expect("safetensors");
    SingleModule::new(Path::new("model"), (2, 3), &Value::Null, &stored, |_| true)
}

fn refusal<T>(head: [f32; 6], act: impl Fn(&Reference<'_>) -> Result<T>) -> String {
    let source = model(head);
    let inventory = Inventory::read(&source, &[]).expect("inventory");
    let reference = Reference::open(&source, &inventory).expect("reference");
    match act(&reference) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_weight_that_is_not_a_number_is_named_by_row_and_column() {
    let head = [0.0, 0.0, 0.0, 0.0, f32::NAN, 0.0];
    let expected = "the weight of `lm_head` is NaN at row 1, column 1";
    assert!(refusal(head, |reference| reference.weight(MODULE)).contains(expected));
    let hidden = Array2::zeros((1, 3));
    assert!(refusal(head, |reference| reference.logits(&hidden, Acts::Off)).contains(expected));
}

#[test]
fn an_activation_that_overflows_is_named_by_position() {
    let hidden = Array2::from_elem((2, 3), f64::INFINITY);
    let message = refusal([1.0; 6], |reference| reference.logits(&hidden, Acts::Off));
    assert!(message.contains("the output of `lm_head` is NaN at position 0"), "{message}");
}

#[test]
fn a_token_outside_the_vocabulary_is_named_with_its_position() {
    let message = refusal([0.0; 6], |reference| reference.embed(&[1, 0, 2]));
    assert!(message.contains("token 2 at position 2 is outside the vocabulary of 2"), "{message}");
}

#[test]
fn hidden_states_of_another_width_are_refused() {
    let message = refusal([0.0; 6], |reference| reference.layer(0, Array2::zeros((1, 4)), Acts::Off));
    assert!(message.contains("width 4"), "{message}");
}

#[test]
fn unknown_modules_and_layers_are_refused() {
    assert!(refusal([0.0; 6], |reference| reference.weight("model.norm")).contains("no linear `model.norm`"));
    let message = refusal([0.0; 6], |reference| reference.layer(1, Array2::zeros((1, 3)), Acts::Off));
    assert!(message.contains("no layer 1"), "{message}");
}

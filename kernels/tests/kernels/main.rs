//! The kernels against definitions written out and against values of compressed-tensors, on every instruction set that
//! this machine has.

mod activations;
mod arithmetic;
mod attention;
mod elementwise;
mod exact;
mod plain;

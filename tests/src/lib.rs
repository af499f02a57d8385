//! What the whole-program tests share.

pub mod assets;
pub mod checks;
pub mod compare;
pub mod cramped;
pub mod crews;
pub mod deeper;
pub mod models;
pub mod oracle;
pub mod safetensors_file;

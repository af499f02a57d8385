//! CUDA devices through NVIDIA's driver.
//!
//! [`probe()`] is the only door: it says what this machine has, or why nothing can be done with it and what would help;
//! nothing else of CUDA may be touched without a [`Machine`]. Nothing is linked: the driver, the compiler (NVRTC), the
//! library of dense products (cuBLASLt) and that of collectives (NCCL) are found when ctq runs, so that one binary
//! serves machines with and without them.

mod architecture;
mod communicator;
mod compile;
mod context;
mod cubin_cache;
mod cublaslt;
mod dense;
mod device;
mod kernels;
mod library;
mod machine;
mod memory;
mod nccl;
mod nvrtc;
mod parcels;
mod peers;
mod probe;
mod sources;
mod staging;
mod tables;

pub use self::communicator::Nccl;
pub use self::device::CudaDevice;
pub use self::library::{Found, NotFound, Version};
pub use self::machine::{DeviceInfo, Driver, Kernels, Machine, Survey, WhyNot};
pub use self::memory::CudaMemory;
pub use self::nccl::{NcclLibrary, UniqueId};
pub use self::parcels::CudaParcel;
pub use self::peers::CudaMark;
pub use self::probe::{free_memory, probe, survey};

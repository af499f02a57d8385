//! What a machine has for CUDA, as plain data, and what follows from it. Touches nothing: tests make such machines up.

use super::architecture;
use super::compile;
use super::library::{Found, NotFound, Version};

/// A device that the driver shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number: the `N` of `cuda:N`.
    pub ordinal: usize,
    /// Its name: `NVIDIA H200`.
    pub name: String,
    /// Compute capability: (9, 0).
    pub capability: (u32, u32),
    /// Bytes of memory.
    pub memory: u64,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Ordinals of devices whose memory it can address.
    pub peers: Vec<usize>,
}

/// The driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The CUDA it is of.
    pub cuda: Version,
    /// Its own version, such as 580.95.05, where the system tells.
    pub release: Option<String>,
    /// Its devices; at least one.
    pub devices: Vec<DeviceInfo>,
}

/// Where a device's kernels come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// Built into ctq for this target.
    Prebuilt(String),
    /// Compiled by NVRTC for this target.
    Compiled(String),
}

/// Why CUDA cannot be used, and what would help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WhyNot {
    /// No driver, and no device that would need one.
    #[error("there is no NVIDIA driver: libcuda.so.1 is not found{}",
        if *.module_loaded { ", although the system has its kernel module; a container sees GPUs only when it is started with them" } else { "" })]
    NoDriver {
        /// Whether the system's kernel has NVIDIA's module: it has a GPU, which this process may not be meant to see.
        module_loaded: bool,
    },
    /// A device, and no library to use it.
    #[error(
        "there is an NVIDIA GPU ({device}) and no driver to use it: libcuda.so.1 is not found; install the driver that fits the kernel's, and in a container start it with the GPU's libraries (`docker run --gpus all`)"
    )]
    NoDriverLibrary {
        /// The device's file.
        device: String,
    },
    /// A driver that shows no device.
    #[error("the NVIDIA driver shows no GPU{}", .visible.as_ref().map_or_else(String::new, |visible| format!(" (CUDA_VISIBLE_DEVICES is `{visible}`)")))]
    NoDevice {
        /// `CUDA_VISIBLE_DEVICES`, where it is set.
        visible: Option<String>,
    },
    /// A driver that does not work.
    #[error(
        "the NVIDIA driver does not work: {what}; see whether `nvidia-smi` works, and install the driver anew or start the machine again"
    )]
    DriverFailed {
        /// What fails.
        what: String,
    },
    /// A driver of an early CUDA.
    #[error(
        "the NVIDIA driver is of CUDA {cuda}, and ctq needs CUDA 12.0 or later; update the driver to 525 or later"
    )]
    DriverTooOld {
        /// What it is of.
        cuda: Version,
    },
    /// Nothing to compile kernels with.
    #[error("there is no NVRTC to compile kernels with: {nvrtc}; {} and run the same command again, or set CTQ_NVRTC to its file", pip(*.major))]
    NoCompiler {
        /// CUDA of the driver.
        major: u32,
        /// What was found of it.
        nvrtc: NotFound,
    },
    /// A compiler that does not know the device.
    #[error("NVRTC {version} cannot compile for {device} (compute capability {}.{}); {} and run the same command again", .capability.0, .capability.1, pip(*.major))]
    CompilerTooOld {
        /// Name of the device.
        device: String,
        /// Its compute capability.
        capability: (u32, u32),
        /// The compiler's version.
        version: Version,
        /// CUDA of the driver.
        major: u32,
    },
    /// A device that is too old.
    #[error("{device} has compute capability {}.{}, and ctq's kernels need 8.0 (Ampere) or later; take a newer GPU", .capability.0, .capability.1)]
    UnsupportedArchitecture {
        /// Name of the device.
        device: String,
        /// Its compute capability.
        capability: (u32, u32),
    },
    /// A device that is not there.
    #[error(
        "there is no device cuda:{ordinal}: the driver shows {count}, counted from 0; `ctq doctor` lists them"
    )]
    NoSuchDevice {
        /// What was asked for.
        ordinal: usize,
        /// Devices that there are.
        count: usize,
    },
}

/// The one line that installs NVRTC for a driver of this CUDA.
fn pip(major: u32) -> String {
    match major {
        ..=12 => "run `pip install nvidia-cuda-nvrtc-cu12`".to_owned(),
        // From CUDA 13 on the packages' names have no version.
        major => format!("run `pip install 'nvidia-cuda-nvrtc=={major}.*'`"),
    }
}

impl WhyNot {
    /// Whether there is a GPU that could be used if this were put right. Otherwise there is none to miss.
    pub fn gpu_is_there(&self) -> bool {
        match self {
            WhyNot::NoDriver { .. } | WhyNot::NoDevice { .. } => false,
            WhyNot::NoDriverLibrary { .. }
            | WhyNot::DriverFailed { .. }
            | WhyNot::DriverTooOld { .. }
            | WhyNot::NoCompiler { .. }
            | WhyNot::CompilerTooOld { .. }
            | WhyNot::UnsupportedArchitecture { .. }
            | WhyNot::NoSuchDevice { .. } => true,
        }
    }
}

/// Everything that was found, whether or not it can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// The driver and its devices.
    pub driver: Result<Driver, WhyNot>,
    /// The compiler.
    pub nvrtc: Result<Found, NotFound>,
    /// Targets that it compiles for, such as 80 and 90.
    pub nvrtc_targets: Vec<u32>,
    /// The library of dense products.
    pub cublaslt: Result<Found, NotFound>,
    /// The library of collectives.
    pub nccl: Result<Found, NotFound>,
    /// Targets whose kernels are built into ctq.
    pub prebuilt: Vec<String>,
}

/// A machine with at least one device that ctq can use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The driver and its devices.
    pub driver: Driver,
    /// Where each device's kernels come from, or why it cannot be used.
    pub kernels: Vec<Result<Kernels, WhyNot>>,
    /// The compiler.
    pub nvrtc: Result<Found, NotFound>,
    /// The library of dense products; without it ctq's own kernels serve.
    pub cublaslt: Result<Found, NotFound>,
    /// The library of collectives.
    pub nccl: Result<Found, NotFound>,
}

impl Survey {
    /// Where a device's kernels come from.
    ///
    /// # Errors
    /// Where it cannot be used.
    pub fn kernels(&self, device: &DeviceInfo, cuda: Version) -> Result<Kernels, WhyNot> {
        let (name, capability) = (device.name.clone(), device.capability);
        if capability < architecture::LOWEST {
            return Err(WhyNot::UnsupportedArchitecture { device: name, capability });
        }
        if let Some(target) = compile::prebuilt_for(capability, &self.prebuilt) {
            return Ok(Kernels::Prebuilt(target));
        }
        let found = self
            .nvrtc
            .as_ref()
            .map_err(|nvrtc| WhyNot::NoCompiler { major: cuda.major, nvrtc: nvrtc.clone() })?;
        architecture::best(capability, &self.nvrtc_targets).map(Kernels::Compiled).ok_or(
            WhyNot::CompilerTooOld { device: name, capability, version: found.version, major: cuda.major },
        )
    }

    /// The machine, where a device of it can be used.
    ///
    /// # Errors
    /// What is wrong with the driver, or with the first device.
    pub fn machine(&self) -> Result<Machine, WhyNot> {
        let driver = self.driver.clone()?;
        let kernels: Vec<Result<Kernels, WhyNot>> =
            driver.devices.iter().map(|device| self.kernels(device, driver.cuda)).collect();
        if let (Some(Err(why)), true) = (kernels.first(), kernels.iter().all(Result::is_err)) {
            return Err(why.clone());
        }
        Ok(Machine {
            driver,
            kernels,
            nvrtc: self.nvrtc.clone(),
            cublaslt: self.cublaslt.clone(),
            nccl: self.nccl.clone(),
        })
    }
}

impl Machine {
    /// Ordinals of the devices that can be used; at least one.
    pub fn usable(&self) -> Vec<usize> {
        let devices = self.driver.devices.iter().zip(&self.kernels);
        devices.filter(|(_, kernels)| kernels.is_ok()).map(|(device, _)| device.ordinal).collect()
    }

    /// A device, and where its kernels come from.
    ///
    /// # Errors
    /// Where it is not there or cannot be used.
    pub fn device(&self, ordinal: usize) -> Result<(&DeviceInfo, &Kernels), WhyNot> {
        let count = self.driver.devices.len();
        let (device, kernels) = self
            .driver
            .devices
            .get(ordinal)
            .zip(self.kernels.get(ordinal))
            .ok_or(WhyNot::NoSuchDevice { ordinal, count })?;
        Ok((device, kernels.as_ref().map_err(WhyNot::clone)?))
    }
}

#[cfg(test)]
#[path = "tests/machine.rs"]
mod tests;

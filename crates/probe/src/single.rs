//! Single requests to a device, for tests of one thing at a time.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::ioctl::{Opcode, Setter, ioctl, opcode};
use serde::Deserialize;
use serde_json::json;

use crate::base64;
use crate::buffer::Buffer;
use crate::device::Device;
use crate::protocol::{Answer, Failure};

const BLKDISCARD: Opcode = opcode::none(0x12, 119);
const BLKZEROOUT: Opcode = opcode::none(0x12, 127);
/// The most that one request carries.
const LENGTH_MAX: u64 = 16 << 20;

/// Arguments of all single requests.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Single {
    device: String,
    #[serde(default)]
    offset: u64,
    #[serde(default)]
    length: Option<u64>,
    #[serde(default)]
    byte: u8,
    #[serde(default)]
    data_b64: Option<String>,
}

impl Single {
    fn length(&self) -> Result<u64, Failure> {
        self.length.ok_or_else(|| Failure::invalid("length is missing"))
    }

    fn buffer(&self, length: u64) -> Result<Buffer, Failure> {
        if length == 0 || length > LENGTH_MAX || length % 512 != 0 || self.offset % 512 != 0 {
            let text = format!("offset and length are multiples of 512, up to {LENGTH_MAX} bytes");
            return Err(Failure::invalid(text));
        }
        Ok(Buffer::new(length as usize))
    }

    /// Carries out the command of this name. Blocks.
    pub fn carry_out(&self, cmd: &str) -> Answer {
        let device = Device::find(&self.device)?;
        let failed = |error: std::io::Error| {
            let errno = error.raw_os_error().unwrap_or(0);
            Failure::failed(format!("{cmd} on {}: {error} (errno {errno})", device.name))
        };
        let file = device.open(cmd != "read_raw").map_err(failed)?;
        match cmd {
            "flush" => file.sync_data().map_err(failed)?,
            "discard" | "write_zeroes" => {
                let range = [self.offset, self.length()?];
                let done = if cmd == "discard" {
                    // SAFETY: BLKDISCARD reads two u64, the byte range, through its argument.
                    unsafe { ioctl(file.as_fd(), Setter::<BLKDISCARD, _>::new(range)) }
                } else {
                    // SAFETY: BLKZEROOUT reads two u64, the byte range, through its argument.
                    unsafe { ioctl(file.as_fd(), Setter::<BLKZEROOUT, _>::new(range)) }
                };
                done.map_err(|errno| failed(errno.into()))?;
            }
            "fill" => {
                let end = self.offset.saturating_add(self.length()?);
                let mut offset = self.offset;
                while offset < end {
                    let length = (end - offset).min(1 << 20);
                    let mut buffer = self.buffer(length)?;
                    buffer.fill(self.byte);
                    file.write_all_at(&buffer, offset).map_err(failed)?;
                    offset += length;
                }
            }
            "read_raw" => {
                let mut buffer = self.buffer(self.length()?)?;
                file.read_exact_at(&mut buffer, self.offset).map_err(failed)?;
                return Ok(json!({"data_b64": base64::encode(&buffer)}));
            }
            "write_raw" => {
                let data = base64::decode(self.data_b64.as_deref().unwrap_or_default())
                    .ok_or_else(|| Failure::invalid("data_b64 is not base64"))?;
                let mut buffer = self.buffer(data.len() as u64)?;
                buffer.copy_from_slice(&data);
                file.write_all_at(&buffer, self.offset).map_err(failed)?;
            }
            other => return Err(Failure::invalid(format!("no single request {other:?}"))),
        }
        Ok(json!({}))
    }
}

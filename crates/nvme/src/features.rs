//! What a driver can set [5.14.1, 5.21.1].

use serde::{Deserialize, Serialize};

use crate::spec::Status;

/// Identifiers of features.
mod id {
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER: u8 = 0x02;
    pub const TEMPERATURE: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const WRITE_CACHE: u8 = 0x06;
    pub const QUEUES: u8 = 0x07;
    pub const COALESCING: u8 = 0x08;
    pub const VECTOR: u8 = 0x09;
    pub const ATOMICITY: u8 = 0x0a;
    pub const EVENTS: u8 = 0x0b;
}

/// The values that are kept; the rest is the same for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    arbitration: u32,
    temperature: u32,
    error_recovery: u32,
    coalescing: u32,
    atomicity: u32,
    events: u32,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            arbitration: 0,
            // 343 K: above it a warning would be due.
            temperature: 0x157,
            error_recovery: 0,
            coalescing: 0,
            atomicity: 0,
            events: 0,
        }
    }
}

impl Features {
    /// The value of a feature; `select` 0 is the present one, 1 the default, 2 the saved one.
    ///
    /// # Errors
    /// [`Status::FIELD`]: there is no such feature, or it is not to be selected so.
    pub fn get(&self, dword10: u32, queues: u16) -> Result<u32, Status> {
        let defaults = Self::default();
        let (id, select) = (dword10 as u8, dword10 >> 8 & 7);
        let of = match select {
            0 => self,
            1 | 2 => &defaults,
            // What can be done with it: changed, for the whole controller.
            3 => return Ok(4),
            _ => return Err(Status::FIELD),
        };
        Ok(match id {
            id::ARBITRATION => of.arbitration,
            id::POWER | id::VECTOR => 0,
            id::TEMPERATURE => of.temperature,
            id::ERROR_RECOVERY => of.error_recovery,
            id::WRITE_CACHE => 1,
            id::QUEUES => u32::from(queues - 1) << 16 | u32::from(queues - 1),
            id::COALESCING => of.coalescing,
            id::ATOMICITY => of.atomicity,
            id::EVENTS => of.events,
            _ => return Err(Status::FIELD),
        })
    }

    /// Sets a feature; gives the result of the command.
    ///
    /// # Errors
    /// The status that the command ends with.
    pub fn set(&mut self, dword10: u32, dword11: u32, queues: u16) -> Result<u32, Status> {
        if dword10 >> 31 != 0 {
            // Nothing is kept over a power cut.
            return Err(Status(0x410d));
        }
        match dword10 as u8 {
            id::ARBITRATION => self.arbitration = dword11,
            id::TEMPERATURE => self.temperature = dword11,
            id::ERROR_RECOVERY => self.error_recovery = dword11,
            id::COALESCING => self.coalescing = dword11,
            id::ATOMICITY => self.atomicity = dword11,
            id::EVENTS => self.events = dword11,
            id::POWER | id::VECTOR => {}
            // It cannot be switched off: where the data is, is the host's page cache.
            id::WRITE_CACHE if dword11 & 1 == 1 => {}
            id::QUEUES if dword11 & 0xffff != 0xffff && dword11 >> 16 != 0xffff => {
                return self.get(id::QUEUES.into(), queues);
            }
            _ => return Err(Status::FIELD),
        }
        Ok(0)
    }
}

//! What the controller tells of itself [5.15]; log pages [5.14].

use crate::spec::{ALL_NAMESPACES, EVENTS_MOST, MDTS, NAMESPACE, Status, VERSION};

/// Bytes of what Identify gives.
pub const LEN: usize = 4096;

/// What is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Of the function, for the vendor's fields.
    pub ids: (u16, u16),
    /// At most 20 bytes.
    pub serial: String,
    /// Blocks of the namespace.
    pub blocks: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// The namespace must not be written.
    pub read_only: bool,
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// ASCII, padded with spaces.
fn put_text(page: &mut [u8], at: usize, len: usize, text: &str) {
    page[at..at + len].fill(b' ');
    let bytes = text.bytes().filter(|byte| (b' '..=b'~').contains(byte)).take(len);
    page[at..at + len].iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
}

impl Told {
    /// What Identify gives.
    ///
    /// # Errors
    /// The status that the command ends with.
    pub fn identify(&self, structure: u8, namespace: u32) -> Result<[u8; LEN], Status> {
        let mut page = [0; LEN];
        match structure {
            0x00 => self.namespace(namespace, &mut page)?,
            0x01 => self.controller(&mut page),
            // The namespaces that there are behind this number.
            0x02 if namespace < ALL_NAMESPACES - 1 => {
                if namespace < NAMESPACE {
                    put(&mut page, 0, &NAMESPACE.to_le_bytes());
                }
            }
            0x02 => return Err(Status::NAMESPACE),
            0x03 => self.descriptors(namespace, &mut page)?,
            _ => return Err(Status::FIELD),
        }
        Ok(page)
    }

    fn controller(&self, page: &mut [u8; LEN]) {
        put(page, 0, &self.ids.0.to_le_bytes());
        put(page, 2, &self.ids.0.to_le_bytes());
        put_text(page, 4, 20, &self.serial);
        put_text(page, 24, 40, "sempervirt NVMe");
        put_text(page, 64, 8, env!("CARGO_PKG_VERSION"));
        page[72] = 6; // RAB: commands of one queue that are taken together, as a power of two
        page[77] = MDTS;
        put(page, 80, &VERSION.to_le_bytes());
        page[111] = 1; // CNTRLTYPE: an I/O controller
        page[258] = 3; // ACL: outstanding aborts, 0's based
        page[259] = EVENTS_MOST as u8 - 1; // AERL
        page[260] = 3; // FRMW: one slot of firmware, read-only
        page[261] = 0; // LPA
        page[262] = 0; // ELPE: one entry in the log of errors
        put(page, 266, &0x157u16.to_le_bytes()); // WCTEMP, in K
        put(page, 268, &0x175u16.to_le_bytes()); // CCTEMP
        page[512] = 0x66; // SQES
        page[513] = 0x44; // CQES
        put(page, 516, &NAMESPACE.to_le_bytes()); // NN
        put(page, 520, &0x000cu16.to_le_bytes()); // ONCS: dataset management, write zeroes
        page[525] = 1; // VWC: there is a volatile cache
        put(page, 536, &1u32.to_le_bytes()); // SGLS: supported, of any alignment
        let name = format!("nqn.2014-08.org.nvmexpress:sempervirt:{}", self.serial);
        let name = name.as_bytes();
        put(page, 768, &name[..name.len().min(223)]); // SUBNQN
    }

    fn namespace(&self, namespace: u32, page: &mut [u8; LEN]) -> Result<(), Status> {
        if !matches!(namespace, NAMESPACE | ALL_NAMESPACES) {
            return Err(Status::NAMESPACE);
        }
        for at in [0, 8, 16] {
            put(page, at, &self.blocks.to_le_bytes()); // NSZE, NCAP, NUSE
        }
        // DLFEAT (33) stays 0: not every file system makes zeros of what is discarded.
        page[99] = u8::from(self.read_only); // NSATTR: write protected
        page[128 + 2] = self.block_size.trailing_zeros() as u8; // LBAF0: LBADS
        Ok(())
    }

    /// The namespace's identifiers: a UUID made of the serial number, which is the same wherever
    /// the VM runs.
    fn descriptors(&self, namespace: u32, page: &mut [u8; LEN]) -> Result<(), Status> {
        if namespace != NAMESPACE {
            return Err(Status::NAMESPACE);
        }
        put(page, 0, &[3, 16, 0, 0]);
        put(page, 4, &self.uuid());
        Ok(())
    }

    fn uuid(&self) -> [u8; 16] {
        // FNV-1a, twice with another beginning: no secret, only the same each time.
        let hash = |seed: u64| {
            self.serial
                .bytes()
                .fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
        };
        let mut uuid = [0; 16];
        put(&mut uuid, 0, &hash(0xcbf2_9ce4_8422_2325).to_be_bytes());
        put(&mut uuid, 8, &hash(0x9ae1_6a3b_2f90_404f).to_be_bytes());
        // Version 8: made as its maker likes it.
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }
}

/// The bytes of a log page, from its beginning.
///
/// # Errors
/// [`Status::LOG`]: there is no such page.
pub fn log(page: u8, units: (u64, u64)) -> Result<Vec<u8>, Status> {
    Ok(match page {
        // Errors: none that a completion did not tell of.
        0x01 => vec![0; 64],
        0x02 => health(units),
        0x03 => {
            let mut slots = vec![0; 512];
            slots[0] = 1;
            put_text(&mut slots, 8, 8, env!("CARGO_PKG_VERSION"));
            slots
        }
        0x05 => effects(),
        _ => return Err(Status::LOG),
    })
}

/// Commands that there are, and that change the namespace.
fn effects() -> Vec<u8> {
    use crate::spec::{admin, io};
    let mut effects = vec![0; 4096];
    let mut put = |at: usize, value: u32| {
        effects[at * 4..at * 4 + 4].copy_from_slice(&value.to_le_bytes());
    };
    for opcode in [
        admin::DELETE_SQ,
        admin::CREATE_SQ,
        admin::GET_LOG,
        admin::DELETE_CQ,
        admin::CREATE_CQ,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::EVENT,
    ] {
        put(opcode.into(), 1);
    }
    for (opcode, value) in
        [(io::FLUSH, 1), (io::WRITE, 3), (io::READ, 1), (io::WRITE_ZEROES, 3), (io::DSM, 3)]
    {
        put(256 + usize::from(opcode), value);
    }
    effects
}

fn health((read, written): (u64, u64)) -> Vec<u8> {
    let mut page = vec![0; 512];
    put(&mut page, 1, &300u16.to_le_bytes()); // temperature, in K
    page[3] = 100; // spare
    page[4] = 10; // its threshold
    // Units of 1000 times 512 bytes, rounded up.
    put(&mut page, 32, &read.div_ceil(512_000).to_le_bytes());
    put(&mut page, 48, &written.div_ceil(512_000).to_le_bytes());
    page
}

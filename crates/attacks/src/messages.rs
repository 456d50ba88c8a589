//! A front end, and the guest behind it, against the vhost-user device with its threads.

use std::cell::OnceCell;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use semper_blkd::hostile::{Server, Target};
use semper_block::NullEngine;
use semper_inflight::format::{
    ENTRY_COUNTER, ENTRY_INFLIGHT, ENTRY_SIZE, HEADER_SIZE, OFFSET_DESC_NUM, OFFSET_USED_IDX,
    OFFSET_VERSION, VERSION, queue_stride,
};
use semper_testbed::Layout;
use tempfile::NamedTempFile;

use crate::bytes::Bytes;
use crate::erratic::Erratic;
use crate::ground::{Ground, QUEUE_SPACE, R0, USER_OFFSET, guest_step, sensible_request, specs};

const HEADER_VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;
const QUEUES: u16 = 4;
const MAX_MESSAGES: usize = 64;
const IMAGE_LEN: u64 = 1 << 20;

// vhost-user's numbers of requests.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const RESET_OWNER: u32 = 4;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const RESET_DEVICE: u32 = 34;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

struct Stage {
    ground: Ground,
    inflight: File,
    eventfd: File,
    servers: [Server; 2],
    _image: NamedTempFile,
}

thread_local!(static STAGE: OnceCell<Stage> = const { OnceCell::new() });

impl Stage {
    fn new() -> Self {
        let image = NamedTempFile::new().expect("a file for the image");
        image.as_file().set_len(IMAGE_LEN).expect("room for the image");
        let target = Target::new(image.path(), false, QUEUES);
        let servers = [target.device(2, NullEngine::new), target.device(1, Erratic::new)];
        // SAFETY: two new descriptors, checked and then owned.
        let [inflight, eventfd] = unsafe {
            [
                libc::memfd_create(c"inflight".as_ptr(), libc::MFD_CLOEXEC),
                libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK),
            ]
            .map(|fd| {
                assert!(fd >= 0);
                File::from_raw_fd(fd)
            })
        };
        inflight.set_len(64 << 10).expect("room for the region");
        Self { ground: Ground::new(), inflight, eventfd, servers, _image: image }
    }
}

/// Plays a conversation that `data` describes: sensible messages with a field or two that are not,
/// in any order, and raw bytes; with descriptors that fit and others; over rings that a guest
/// fills with whatever it likes. The device answers or hangs up, and serves the next front end.
pub fn messages(data: &[u8]) {
    STAGE.with(|stage| attack(stage.get_or_init(Stage::new), &mut Bytes(data)));
}

fn attack(stage: &Stage, bytes: &mut Bytes<'_>) {
    stage.ground.clear();
    let (ours, theirs) = UnixStream::pair().expect("two sockets");
    let mut talk = Talk { stage, socket: &ours, size: 1 << (bytes.u8() % 7) };
    let flags = bytes.u8();
    if flags & 1 == 0 {
        talk.usual_beginning(bytes);
    }
    if flags & 2 == 0 {
        talk.start_queue(u32::from(flags / 4 % 4));
    }
    for _ in 0..MAX_MESSAGES {
        if bytes.is_empty() {
            break;
        }
        talk.message(bytes);
    }
    ours.shutdown(std::net::Shutdown::Write).expect("an end of the talk");
    stage.servers[usize::from(flags >> 7)].serve(theirs);
}

struct Talk<'a> {
    stage: &'a Stage,
    socket: &'a UnixStream,
    size: u16,
}

impl Talk<'_> {
    fn send(&mut self, request: u32, body: &[u8], fds: &[i32]) {
        self.send_raw(request, HEADER_VERSION | NEED_REPLY, body.len() as u32, body, fds);
    }

    fn send_raw(&mut self, request: u32, flags: u32, size: u32, body: &[u8], fds: &[i32]) {
        let mut raw = Vec::with_capacity(12 + body.len());
        raw.extend(request.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(size.to_le_bytes());
        raw.extend(body);
        send_with_descriptors(self.socket, &raw, fds);
    }

    /// What every front end says first; the guest has filled its rings before.
    fn usual_beginning(&mut self, bytes: &mut Bytes<'_>) {
        self.guest(bytes);
        self.send(GET_FEATURES, &[], &[]);
        self.send(GET_PROTOCOL_FEATURES, &[], &[]);
        self.send(SET_PROTOCOL_FEATURES, &u64::MAX.to_le_bytes(), &[]);
        self.send(SET_OWNER, &[], &[]);
        let features = 1u64 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 12;
        self.send(SET_FEATURES, &features.to_le_bytes(), &[]);
        if bytes.u8() % 2 == 0 {
            self.set_inflight(bytes);
        }
        let table = memory_table();
        let fd = self.stage.ground.fd();
        self.send(SET_MEM_TABLE, &table, &[fd, fd, fd]);
    }

    /// The guest makes requests, and some mischief.
    fn guest(&mut self, bytes: &mut Bytes<'_>) {
        let ground = &self.stage.ground;
        let ring = ground.ring(self.size);
        for _ in 0..bytes.u8() % 32 {
            match bytes.u8() % 4 {
                0 => guest_step(ground, &ring, bytes),
                _ => sensible_request(ground, &ring, bytes, IMAGE_LEN),
            }
        }
    }

    fn start_queue(&mut self, index: u32) {
        let eventfd = self.stage.eventfd.as_raw_fd();
        self.send(SET_VRING_NUM, &pair(index, u32::from(self.size)), &[]);
        self.send(SET_VRING_BASE, &pair(index, 0), &[]);
        let layout = Layout::packed(0, self.size);
        self.send(SET_VRING_ADDR, &vring_address(index, layout), &[]);
        self.send(SET_VRING_CALL, &u64::from(index).to_le_bytes(), &[eventfd]);
        self.send(SET_VRING_KICK, &u64::from(index).to_le_bytes(), &[eventfd]);
        self.send(SET_VRING_ENABLE, &pair(index, 1), &[]);
    }

    fn set_inflight(&mut self, bytes: &mut Bytes<'_>) {
        let stride = queue_stride(self.size);
        let mut region = vec![0; stride * usize::from(QUEUES)];
        for part in region.chunks_mut(stride) {
            let kind = bytes.u8();
            if kind % 8 == 0 {
                // Fresh, or whatever it is.
                let raw = bytes.take(usize::from(kind / 8));
                part[..raw.len()].copy_from_slice(raw);
                continue;
            }
            // As a backend leaves it, with these requests in flight.
            part[OFFSET_VERSION..][..2].copy_from_slice(&VERSION.to_le_bytes());
            part[OFFSET_DESC_NUM..][..2].copy_from_slice(&self.size.to_le_bytes());
            part[OFFSET_USED_IDX] = kind / 8 % 4;
            for entry in part[HEADER_SIZE..].chunks_exact_mut(ENTRY_SIZE) {
                entry[ENTRY_INFLIGHT] = bytes.u8() & 1;
                entry[ENTRY_COUNTER] = bytes.u8();
            }
        }
        self.stage.inflight.write_all_at(&region, 0).expect("room for the region");
        let mut body = [0; 24];
        body[..8].copy_from_slice(&(64u64 << 10).to_le_bytes());
        body[16..18].copy_from_slice(&QUEUES.to_le_bytes());
        body[18..20].copy_from_slice(&self.size.to_le_bytes());
        self.send(SET_INFLIGHT_FD, &body, &[self.stage.inflight.as_raw_fd()]);
    }

    fn message(&mut self, bytes: &mut Bytes<'_>) {
        let index = u32::from(bytes.u8() % 5);
        match bytes.u8() % 28 {
            0 => self.send(GET_FEATURES, &[], &[]),
            1 => self.send(SET_FEATURES, &bytes.u64().to_le_bytes(), &[]),
            2 => self.send(RESET_OWNER, &[], &[]),
            3 => self.send(SET_VRING_NUM, &pair(index, bytes.u32()), &[]),
            4 => {
                let mut body = vring_address(index, Layout::packed(0, self.size));
                let (at, with) = (usize::from(bytes.u8() % 5) * 8, crate::ground::address(bytes));
                body[at..at + 8].copy_from_slice(&with.wrapping_add(USER_OFFSET).to_le_bytes());
                self.send(SET_VRING_ADDR, &body, &[]);
            }
            5 => self.send(SET_VRING_BASE, &pair(index, bytes.u32()), &[]),
            6 | 7 => self.send(GET_VRING_BASE, &pair(index, 0), &[]),
            8 => self.with_descriptor(SET_VRING_KICK, index, bytes),
            9 => self.with_descriptor(SET_VRING_CALL, index, bytes),
            10 => self.with_descriptor(SET_VRING_ERR, index, bytes),
            11 => self.send(GET_PROTOCOL_FEATURES, &[], &[]),
            12 => self.send(GET_QUEUE_NUM, &[], &[]),
            13 => self.send(SET_VRING_ENABLE, &pair(index, u32::from(bytes.u8() % 3)), &[]),
            14 => {
                let (offset, size) = (u32::from(bytes.u16()), u32::from(bytes.u8()));
                self.config(GET_CONFIG, offset, size, &vec![0; size as usize]);
            }
            15 => {
                let value = bytes.take(usize::from(bytes.0.first().copied().unwrap_or(1) % 4));
                self.config(SET_CONFIG, 32, value.len() as u32, value);
            }
            16 => {
                let mut body = [0; 24];
                body[16..18].copy_from_slice(&u16::from(bytes.u8() % 8).to_le_bytes());
                body[18..20].copy_from_slice(&bytes.u16().to_le_bytes());
                self.send(GET_INFLIGHT_FD, &body, &[]);
            }
            17 => self.set_inflight(bytes),
            18 => {
                let mut body = [0; 24];
                let raw = bytes.take(24);
                body[..raw.len()].copy_from_slice(raw);
                self.send(SET_INFLIGHT_FD, &body, &[self.stage.inflight.as_raw_fd()]);
            }
            19 => self.send(RESET_DEVICE, &[], &[]),
            20 => self.send(GET_MAX_MEM_SLOTS, &[], &[]),
            21 => self.memory_region(ADD_MEM_REG, bytes),
            22 => self.memory_region(REM_MEM_REG, bytes),
            23 => {
                let mut table = memory_table();
                let at = usize::from(bytes.u8()) % (table.len() - 8);
                table[at..at + 8].copy_from_slice(&bytes.u64().to_le_bytes());
                let fd = self.stage.ground.fd();
                self.send(SET_MEM_TABLE, &table, &[fd; 3][..usize::from(bytes.u8() % 4)]);
            }
            24 => self.start_queue(index),
            25 => {
                self.guest(bytes);
                // A kick; a full counter is as good.
                let _ = (&self.stage.eventfd).write(&1u64.to_ne_bytes());
            }
            26 => {
                // Any request with any body.
                let (request, len) = (u32::from(bytes.u8() % 48), usize::from(bytes.u8()));
                let body = bytes.take(len);
                let fds = [self.stage.eventfd.as_raw_fd(); 2];
                let size = if bytes.u8() % 8 == 0 { bytes.u32() } else { body.len() as u32 };
                let flags = HEADER_VERSION | u32::from(bytes.u8() % 16) << 2;
                self.send_raw(request, flags, size, body, &fds[..usize::from(bytes.u8() % 3)]);
            }
            _ => {
                let len = usize::from(bytes.u8());
                send_with_descriptors(self.socket, bytes.take(len), &[]);
            }
        }
    }

    fn with_descriptor(&mut self, request: u32, index: u32, bytes: &mut Bytes<'_>) {
        let eventfd = self.stage.eventfd.as_raw_fd();
        let kind = bytes.u8();
        let mut word = u64::from(index);
        let fds: &[i32] = match kind % 8 {
            0 => &[self.stage.ground.fd()],
            1 => &[eventfd, eventfd],
            2 => {
                // "No descriptor": polling.
                word |= 1 << 8;
                &[]
            }
            3 => &[],
            _ => &[eventfd],
        };
        self.send(request, &word.to_le_bytes(), fds);
    }

    fn config(&mut self, request: u32, offset: u32, size: u32, payload: &[u8]) {
        let mut body = Vec::new();
        body.extend(offset.to_le_bytes());
        body.extend(size.to_le_bytes());
        body.extend(1u32.to_le_bytes());
        body.extend(payload);
        self.send(request, &body, &[]);
    }

    fn memory_region(&mut self, request: u32, bytes: &mut Bytes<'_>) {
        let mut body = [0; 40];
        let base = match bytes.u8() % 4 {
            0 => bytes.u64(),
            n => (1 << 32) + (u64::from(n) << 20),
        };
        let size = if bytes.u8() % 4 == 0 { bytes.u64() } else { 0x4000 };
        let offset = if bytes.u8() % 4 == 0 { bytes.u64() } else { 0x1000 };
        for (at, value) in
            [(8, base), (16, size), (24, base.wrapping_add(USER_OFFSET)), (32, offset)]
        {
            body[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        self.send(request, &body, &[self.stage.ground.fd()]);
    }
}

fn pair(first: u32, second: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&first.to_le_bytes());
    body[4..].copy_from_slice(&second.to_le_bytes());
    body
}

fn vring_address(index: u32, layout: Layout) -> [u8; 40] {
    let mut body = [0; 40];
    body[..4].copy_from_slice(&index.to_le_bytes());
    let at = |offset: usize| (R0 + USER_OFFSET + offset as u64).to_le_bytes();
    body[8..16].copy_from_slice(&at(layout.desc));
    body[16..24].copy_from_slice(&at(layout.used));
    body[24..32].copy_from_slice(&at(layout.avail));
    debug_assert!(layout.end as u64 <= QUEUE_SPACE);
    body
}

fn memory_table() -> Vec<u8> {
    let mut body = Vec::new();
    body.extend((specs().len() as u32).to_le_bytes());
    body.extend(0u32.to_le_bytes());
    for spec in specs() {
        for value in [spec.guest_addr, spec.size, spec.user_addr, spec.file_offset] {
            body.extend(value.to_le_bytes());
        }
    }
    body
}

/// Sends bytes and descriptors as one message; a full socket swallows the rest.
fn send_with_descriptors(socket: &UnixStream, bytes: &[u8], fds: &[i32]) {
    if bytes.is_empty() {
        return;
    }
    let mut space = [0u64; 8];
    // SAFETY: a zeroed msghdr is valid; all pointers are to values that live across the call, and
    // the control buffer is aligned and has room for four descriptors.
    unsafe {
        let mut iov =
            libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        if !fds.is_empty() {
            assert!(fds.len() <= 4);
            let len = 4 * fds.len() as u32;
            message.msg_control = space.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(len) as usize;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as usize;
            let data = libc::CMSG_DATA(header).cast::<i32>();
            for (i, fd) in fds.iter().enumerate() {
                data.add(i).write_unaligned(*fd);
            }
        }
        libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL);
    }
}

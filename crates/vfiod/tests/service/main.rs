//! The program itself, with a player of QEMU and of a guest's driver at its other end.

mod golden;
mod machine;
mod moves;
mod protocol;
mod spare;
mod walls;

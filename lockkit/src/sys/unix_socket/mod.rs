//! Abstract Unix sockets: [unix(7)].
//!
//! The kernel gives an abstract name to one socket at a time. It frees the name when the last
//! descriptor of that socket is closed, however its process ended. No file is involved.
//!
//! `socket` has what both kinds share, `seqpacket` the sockets that listen, queue and can be handed
//! over, and `stream` the sockets that carry bytes both ways.
//!
//! [unix(7)]: https://man7.org/linux/man-pages/man7/unix.7.html

pub(crate) mod seqpacket;
pub(crate) mod socket;
pub(crate) mod stream;

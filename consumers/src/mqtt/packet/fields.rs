//! Reading fields from a whole frame. What is not there is an error.

use super::PacketError;

/// The bytes of one packet that are not read yet.
#[derive(Debug, Clone)]
pub(super) struct Fields<'a> {
    packet: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn new(packet: &'static str, rest: &'a [u8]) -> Self {
        Self { packet, rest }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn malformed(&self, what: &'static str) -> PacketError {
        PacketError::Malformed { packet: self.packet, what }
    }

    pub(super) fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], PacketError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or_else(|| self.malformed(what))?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn byte(&mut self, what: &'static str) -> Result<u8, PacketError> {
        let (&byte, rest) = self.rest.split_first().ok_or_else(|| self.malformed(what))?;
        self.rest = rest;
        Ok(byte)
    }

    pub(super) fn two(&mut self, what: &'static str) -> Result<u16, PacketError> {
        let (&bytes, rest) = self.rest.split_first_chunk().ok_or_else(|| self.malformed(what))?;
        self.rest = rest;
        Ok(u16::from_be_bytes(bytes))
    }

    pub(super) fn four(&mut self, what: &'static str) -> Result<u32, PacketError> {
        let (&bytes, rest) = self.rest.split_first_chunk().ok_or_else(|| self.malformed(what))?;
        self.rest = rest;
        Ok(u32::from_be_bytes(bytes))
    }

    /// A number of one to four bytes, seven bits each.
    pub(super) fn variable(&mut self, what: &'static str) -> Result<u32, PacketError> {
        let mut value = 0;
        for shift in [0, 7, 14, 21] {
            let byte = self.byte(what)?;
            value |= u32::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.malformed(what))
    }

    /// Bytes after their length.
    pub(super) fn bytes(&mut self, what: &'static str) -> Result<&'a [u8], PacketError> {
        let length = self.two(what)?;
        self.take(usize::from(length), what)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tokens to values. Pure: bytes in, values and sentences out, cut anywhere.
//!
//! Braces and brackets are counted each for itself. A message ends when neither is open, or as soon as one of them
//! closes more than it opened; only then is an error of grammar told, the first of the message. A stray byte or a limit
//! ends the message at once, and what is left of it is read as new messages: one bad message may yield many errors,
//! as many as QEMU's.

use serde_json::{Map, Number, Value};

use crate::lexer::{Lexer, Token};
use crate::utf8;

/// Bytes of token text in one message.
const MAX_TEXT: usize = 64 << 20;
/// Tokens in one message.
const MAX_TOKENS: usize = 2 << 20;
/// Open braces and brackets together.
const MAX_DEPTH: i64 = 1024;

/// An incremental parser of a stream of JSON values, with QEMU's extensions.
#[derive(Debug)]
pub struct Parser {
    lexer: Lexer,
    message: Assembly,
}

impl Parser {
    /// A parser at the start of a stream.
    pub fn new() -> Parser {
        Parser { lexer: Lexer::new(MAX_TEXT), message: Assembly::default() }
    }

    /// Reads up to the end of one message: how many bytes of `input` it used, and the value or the error, if one was
    /// completed. Call it again with the rest of the bytes; a number or a word ends only at the byte after it, which is
    /// not used up.
    pub fn feed(&mut self, input: &[u8]) -> (usize, Option<Result<Value, String>>) {
        let mut used = 0;
        loop {
            let (n, token) = self.lexer.next(&input[used..]);
            used += n;
            let Some(token) = token else { return (used, None) };
            if let Some(done) = self.message.take_token(token, self.lexer.text()) {
                return (used, Some(done));
            }
        }
    }

    /// The last message of a stream that ends here: an unfinished one is an error.
    pub fn finish(&mut self) -> Option<Result<Value, String>> {
        let token = self.lexer.finish();
        let done = token.and_then(|token| self.message.take_token(token, self.lexer.text()));
        done.or_else(|| (self.message.tokens > 0).then(|| std::mem::take(&mut self.message).end()))
    }
}

impl Default for Parser {
    fn default() -> Parser {
        Parser::new()
    }
}

/// A message so far.
#[derive(Debug, Default)]
struct Assembly {
    braces: i64,
    brackets: i64,
    text: usize,
    tokens: usize,
    open: Vec<Frame>,
    done: Option<Value>,
    /// The first error of grammar; what follows is only counted.
    error: Option<String>,
}

/// A list or object that is not closed yet, and what it expects.
#[derive(Debug)]
enum Frame {
    List(Vec<Value>, Expect),
    Object(Map<String, Value>, String, Expect),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// The first element or key, or the end.
    FirstOrEnd,
    Key,
    Colon,
    Value,
    CommaOrEnd,
}

impl Assembly {
    fn take_token(&mut self, token: Token, text: &[u8]) -> Option<Result<Value, String>> {
        match token {
            Token::OpenBrace => self.braces += 1,
            Token::CloseBrace => self.braces -= 1,
            Token::OpenBracket => self.brackets += 1,
            Token::CloseBracket => self.brackets -= 1,
            Token::Stray => return self.fail(format!("JSON parse error, stray '{}'", utf8::lossy(text))),
            _ => {}
        }
        if token == Token::TooLong || self.text + text.len() + 1 > MAX_TEXT {
            return self.fail("JSON token size limit exceeded".to_owned());
        }
        if self.tokens + 1 > MAX_TOKENS {
            return self.fail("JSON token count limit exceeded".to_owned());
        }
        if self.braces + self.brackets > MAX_DEPTH {
            return self.fail("JSON nesting depth limit exceeded".to_owned());
        }
        self.text += text.len();
        self.tokens += 1;
        if self.error.is_none()
            && let Err(what) = self.build(token, text)
        {
            self.error = Some(what);
            self.open.clear();
        }
        let balanced = self.braces == 0 && self.brackets == 0;
        (balanced || self.braces < 0 || self.brackets < 0).then(|| std::mem::take(self).end())
    }

    fn fail(&mut self, what: String) -> Option<Result<Value, String>> {
        *self = Assembly::default();
        Some(Err(what))
    }

    fn end(self) -> Result<Value, String> {
        let what = match (self.error, self.done) {
            (None, Some(value)) => return Ok(value),
            (Some(what), _) => what,
            (None, None) => "premature EOI".to_owned(),
        };
        Err(format!("JSON parse error, {what}"))
    }

    fn build(&mut self, token: Token, text: &[u8]) -> Result<(), String> {
        match self.open.last_mut() {
            Some(Frame::List(_, expect @ Expect::CommaOrEnd)) => match token {
                Token::Comma => *expect = Expect::Value,
                Token::CloseBracket => return self.close(),
                _ => return Err("expected separator in list".to_owned()),
            },
            Some(Frame::List(_, Expect::FirstOrEnd)) if token == Token::CloseBracket => return self.close(),
            Some(Frame::Object(_, _, Expect::FirstOrEnd)) if token == Token::CloseBrace => return self.close(),
            Some(Frame::Object(_, _, expect @ Expect::Colon)) => match token {
                Token::Colon => *expect = Expect::Value,
                _ => return Err("missing : in object pair".to_owned()),
            },
            Some(Frame::Object(_, _, expect @ Expect::CommaOrEnd)) => match token {
                Token::Comma => *expect = Expect::Key,
                Token::CloseBrace => return self.close(),
                _ => return Err("expected separator in dict".to_owned()),
            },
            _ => match token {
                Token::OpenBrace => self.open.push(Frame::Object(Map::new(), String::new(), Expect::FirstOrEnd)),
                Token::OpenBracket => self.open.push(Frame::List(Vec::new(), Expect::FirstOrEnd)),
                Token::String => return self.place(Value::String(string(text)?)),
                Token::Integer | Token::Float => return self.place(Value::Number(number(token, text)?)),
                Token::Keyword => return self.place(keyword(text)?),
                _ => return Err("expecting value".to_owned()),
            },
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), String> {
        match self.open.pop() {
            Some(Frame::List(list, _)) => self.place(Value::Array(list)),
            Some(Frame::Object(map, _, _)) => self.place(Value::Object(map)),
            None => Ok(()),
        }
    }

    /// Puts a complete value where it belongs.
    fn place(&mut self, value: Value) -> Result<(), String> {
        match self.open.last_mut() {
            None => self.done = Some(value),
            Some(Frame::List(list, expect)) => {
                list.push(value);
                *expect = Expect::CommaOrEnd;
            }
            Some(Frame::Object(map, key, expect @ Expect::Value)) => {
                if map.contains_key(key) {
                    return Err("duplicate key".to_owned());
                }
                map.insert(std::mem::take(key), value);
                *expect = Expect::CommaOrEnd;
            }
            Some(Frame::Object(_, key, expect)) => {
                let Value::String(text) = value else { return Err("key is not a string in object".to_owned()) };
                *key = text;
                *expect = Expect::Colon;
            }
        }
        Ok(())
    }
}

fn keyword(text: &[u8]) -> Result<Value, String> {
    match text {
        b"true" => Ok(Value::Bool(true)),
        b"false" => Ok(Value::Bool(false)),
        b"null" => Ok(Value::Null),
        _ => Err(format!("invalid keyword '{}'", utf8::lossy(text))),
    }
}

/// Integers are exact as far as 64 bits go, signed or unsigned; the rest are doubles. JSON cannot write what lies beyond
/// the largest double, so it stands for it.
fn number(token: Token, text: &[u8]) -> Result<Number, String> {
    let text = std::str::from_utf8(text).map_err(|_| "expecting value".to_owned())?;
    if token == Token::Integer {
        if let Ok(n) = text.parse::<i64>() {
            return Ok(n.into());
        }
        if let Ok(n) = text.parse::<u64>() {
            return Ok(n.into());
        }
    }
    let double: f64 = text.parse().map_err(|_| "expecting value".to_owned())?;
    Number::from_f64(double.clamp(f64::MIN, f64::MAX)).ok_or_else(|| "expecting value".to_owned())
}

/// The value of a string token.
fn string(text: &[u8]) -> Result<String, String> {
    let body = &text[1..text.len() - 1];
    let mut value = String::with_capacity(body.len());
    let mut at = 0;
    while at < body.len() {
        if body[at] != b'\\' {
            let (c, len) = utf8::decode(&body[at..]);
            value.push(c.ok_or_else(|| "invalid UTF-8 sequence in string".to_owned())?);
            at += len;
            continue;
        }
        let (c, len) = escape(&text[at + 1..])?;
        value.push(c);
        at += len;
    }
    Ok(value)
}

/// The character of the escape sequence at the start of `bytes`, and its length.
fn escape(bytes: &[u8]) -> Result<(char, usize), String> {
    let c = match bytes[1] {
        c @ (b'"' | b'\'' | b'\\' | b'/') => char::from(c),
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        b'u' => return unicode_escape(bytes),
        _ => return Err("invalid escape sequence in string".to_owned()),
    };
    Ok((c, 2))
}

/// `\uXXXX`, or two of them that are a surrogate pair. `bytes` runs to the end of the token, quote included, since
/// QEMU shows six bytes of a wrong escape wherever the string ends.
fn unicode_escape(bytes: &[u8]) -> Result<(char, usize), String> {
    let mut len = 6;
    let mut code = hex4(&bytes[2..]);
    if let Some(high @ 0xD800..=0xDBFF) = code
        && bytes.get(6..8) == Some(br"\u")
    {
        code = match hex4(&bytes[8..]) {
            Some(low @ 0xDC00..=0xDFFF) => {
                len = 12;
                Some(0x1_0000 + ((high & 0x3FF) << 10) + (low & 0x3FF))
            }
            _ => None,
        };
    }
    match code.and_then(utf8::character) {
        Some(c) => Ok((c, len)),
        None => Err(format!("{} is not a valid Unicode character", utf8::lossy(&bytes[..len.min(bytes.len())]))),
    }
}

fn hex4(bytes: &[u8]) -> Option<u32> {
    let digits = bytes.get(..4)?;
    digits.iter().try_fold(0, |code, &digit| Some(code << 4 | char::from(digit).to_digit(16)?))
}

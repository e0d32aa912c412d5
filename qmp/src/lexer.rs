// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bytes to tokens, with QEMU's extensions (single quotes) and its way back from garbage.
//!
//! | state | goes on with | ends with |
//! |---|---|---|
//! | between tokens | space, tab, CR, LF | anything else begins a token or is stray |
//! | string | 0x20 to 0xFD, any such byte after a backslash | its quote |
//! | number | JSON's grammar; a zero takes no digit and no exponent after it | the byte after it |
//! | keyword | `a` to `z` | the byte after it |
//! | recovery | what is not named on the right, swallowed | `{}[]:,`, a control character but tab, 0xFE, 0xFF |

/// The kinds of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    OpenBrace,
    CloseBrace,
    OpenBracket,
    CloseBracket,
    Colon,
    Comma,
    String,
    Integer,
    Float,
    Keyword,
    /// A byte that cannot follow: the text ends with it.
    Stray,
    /// The text has passed the limit before its end.
    TooLong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    Recovery,
    /// In a string with this quote.
    String(u8),
    Escape(u8),
    Sign,
    Zero,
    Digits,
    /// After the point, before its first digit.
    Point,
    Fraction,
    /// After the `e`.
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
}

/// What one byte does to a state.
enum Step {
    /// Go on; the byte belongs to the token.
    To(State),
    /// The token ends with this byte.
    Ends(Token),
    /// The token ended before this byte.
    EndsBefore(Token),
    /// The byte belongs to no token.
    Skip,
    /// Look at the byte again between tokens.
    Restart,
    Stray,
}

/// Splits a stream into tokens, however it is cut into pieces.
#[derive(Debug)]
pub(crate) struct Lexer {
    state: State,
    text: Vec<u8>,
    limit: usize,
    /// The text is that of the token last returned, to be dropped before the next.
    spent: bool,
}

impl Lexer {
    /// A lexer between tokens, which takes `limit` bytes for one token.
    pub(crate) fn new(limit: usize) -> Lexer {
        Lexer { state: State::Start, text: Vec::new(), limit, spent: false }
    }

    /// The text of the token last returned, quotes included.
    pub(crate) fn text(&self) -> &[u8] {
        &self.text
    }

    /// The next token of `input` and how many bytes were used; no token means that all of them were.
    pub(crate) fn next(&mut self, input: &[u8]) -> (usize, Option<Token>) {
        if std::mem::take(&mut self.spent) {
            self.text.clear();
        }
        let mut used = 0;
        while used < input.len() {
            let byte = input[used];
            match step(self.state, byte) {
                Step::To(state) => {
                    self.state = state;
                    self.text.push(byte);
                    used += 1;
                    if self.text.len() > self.limit {
                        return (used, self.end(State::Start, Token::TooLong));
                    }
                }
                Step::Ends(token) => {
                    self.text.push(byte);
                    return (used + 1, self.end(State::Start, token));
                }
                Step::EndsBefore(token) => return (used, self.end(State::Start, token)),
                Step::Skip => used += 1,
                Step::Restart => self.state = State::Start,
                Step::Stray => {
                    self.text.push(byte);
                    return (used + 1, self.end(State::Recovery, Token::Stray));
                }
            }
        }
        (used, None)
    }

    /// The token that the end of the input completes, if any.
    pub(crate) fn finish(&mut self) -> Option<Token> {
        if std::mem::take(&mut self.spent) {
            self.text.clear();
        }
        match self.state {
            State::Start | State::Recovery => None,
            State::Zero | State::Digits => self.end(State::Start, Token::Integer),
            State::Fraction | State::ExponentDigits => self.end(State::Start, Token::Float),
            State::Keyword => self.end(State::Start, Token::Keyword),
            _ => self.end(State::Recovery, Token::Stray),
        }
    }

    fn end(&mut self, state: State, token: Token) -> Option<Token> {
        self.state = state;
        self.spent = true;
        Some(token)
    }
}

// One arm for each edge of the table above, in its order.
#[expect(clippy::match_same_arms)]
fn step(state: State, byte: u8) -> Step {
    match (state, byte) {
        (State::Start, b' ' | b'\t' | b'\r' | b'\n') => Step::Skip,
        (State::Start, b'{') => Step::Ends(Token::OpenBrace),
        (State::Start, b'}') => Step::Ends(Token::CloseBrace),
        (State::Start, b'[') => Step::Ends(Token::OpenBracket),
        (State::Start, b']') => Step::Ends(Token::CloseBracket),
        (State::Start, b':') => Step::Ends(Token::Colon),
        (State::Start, b',') => Step::Ends(Token::Comma),
        (State::Start, b'"' | b'\'') => Step::To(State::String(byte)),
        (State::Start, b'-') => Step::To(State::Sign),
        (State::Start | State::Sign, b'0') => Step::To(State::Zero),
        (State::Start | State::Sign, b'1'..=b'9') => Step::To(State::Digits),
        (State::Start | State::Keyword, b'a'..=b'z') => Step::To(State::Keyword),

        (State::Recovery, b'{' | b'}' | b'[' | b']' | b':' | b',' | 0xFE | 0xFF) => Step::Restart,
        (State::Recovery, b'\t' | 0x20..) => Step::Skip,
        (State::Recovery, _) => Step::Restart,

        (State::String(quote), _) if byte == quote => Step::Ends(Token::String),
        (State::String(quote), b'\\') => Step::To(State::Escape(quote)),
        (State::String(quote) | State::Escape(quote), 0x20..=0xFD) => Step::To(State::String(quote)),

        (State::Zero | State::Digits, b'.') => Step::To(State::Point),
        (State::Zero, b'0'..=b'9') => Step::Stray,
        (State::Digits, b'0'..=b'9') => Step::To(State::Digits),
        (State::Point | State::Fraction, b'0'..=b'9') => Step::To(State::Fraction),
        (State::Digits | State::Fraction, b'e' | b'E') => Step::To(State::Exponent),
        (State::Exponent, b'+' | b'-') => Step::To(State::ExponentSign),
        (State::Exponent | State::ExponentSign | State::ExponentDigits, b'0'..=b'9') => Step::To(State::ExponentDigits),

        (State::Zero | State::Digits, _) => Step::EndsBefore(Token::Integer),
        (State::Fraction | State::ExponentDigits, _) => Step::EndsBefore(Token::Float),
        (State::Keyword, _) => Step::EndsBefore(Token::Keyword),
        _ => Step::Stray,
    }
}

package openconnect

// FieldKind is the kind of a form's field.
type FieldKind int

// The kinds of fields. What a server sends beyond is left out.
const (
	FieldText     FieldKind = iota // typed, shown
	FieldPassword                  // typed, not shown
	FieldSelect                    // one of Options
	FieldHidden                    // sent back as it is
)

// Form is what a server asks in one step of a sign-in.
type Form struct {
	ID      string // main, challenge, success ...: the protocol's name for the step
	Title   string
	Banner  string
	Message string
	Error   string
	Action  string // path that the answers go to
	Fields  []Field
}

// Field is one thing that a form asks.
type Field struct {
	Kind    FieldKind
	Name    string // the protocol's: username, password, group_list ...
	Label   string // for people
	Value   string // preset; of a FieldSelect the choice that is offered first
	Options []Option
}

// Option is one choice of a FieldSelect.
type Option struct {
	Value string // what is answered
	Label string // what is shown
}
